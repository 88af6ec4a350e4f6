"""Recorded assets as references: whether they fit a run, and their rows in every block and step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from negengine.bank import About, RecordedStep, checksum
from negengine.diffusers.clock import Clock
from negengine.diffusers.effect import Call
from negengine.diffusers.effects.inputs import approximation, branches, follows_image, further_inputs
from negengine.diffusers.families import Family, Grid, Site, find_denoiser
from negengine.diffusers.fingerprint import fingerprint
from negengine.methods import NegToMe, ReferenceBank

AGAIN = "record it again with negengine.record_bank"


class Banks:
    """The banks of one applied method.

    Attributes:
        by_call: the branches of guidance are calls of the denoiser, one after the other.
        call: int32, which of these the present one is.
        lacking: the run is at a step that was not recorded.
        given: what compiled code was called with last, which is compared between the steps.
    """

    def __init__(self, settings: NegToMe, sites: Sequence[Site], family: Family, denoiser: nn.Module) -> None:
        """``settings``: with the family's defaults. Raises ValueError for banks that do not fit the model, them, or each other."""
        from safetensors import safe_open  # settings without a bank do not need it

        self.banks, self.family = settings.banks, family
        self._check_files()
        self._check_model(denoiser)
        self.branches = self.banks[0].about.branches
        self.window = settings.timesteps
        for bank in self.banks:
            _check_settings(bank, settings, sites)
            if bank.about.branches != self.branches:
                raise ValueError(
                    f"{self.banks[0].path} was recorded with {_branches(self.banks[0].about)}, {bank.path} with "
                    f"{_branches(bank.about)}; record them alike"
                )
        self._files = [safe_open(bank.file, "pt") for bank in self.banks]
        self._keys = [frozenset(file.keys()) for file in self._files]
        self.by_call = family.conditioning.cfg == "calls" and len(self.branches) > 1
        self.call = torch.zeros((), dtype=torch.int32)
        self.lacking = False
        self._begun = self._guided = self._compared = False
        self._clock: Clock | None = None  # until it is known that every step from where the run stands was recorded
        self.given: Mapping[str, Any] | None = None
        self._texts: set[str] = set()
        self._approximate: list[str] = []  # what else is not as in the recording, as the report says it
        self._conditioning: str | None = None  # of the run
        self._negative = ""
        self._steps: dict[int, list[int | None]] = {}  # by position: of each bank the step that it holds
        self._images = 0

    # --- whether they fit ----------------------------------------------------------------------------------------

    def _check_files(self) -> None:
        """Raises ValueError: a file has changed, of which what is mapped into memory may be gone, or may not have been compared."""
        for bank in self.banks:
            bank.check_unchanged()

    def _check_model(self, denoiser: nn.Module) -> None:
        """Raises ValueError: a bank is of another model."""
        found = fingerprint(self.family, denoiser)
        for bank in self.banks:
            for field, what in (
                ("family", "a model of the family {}, and this is one of {}"),
                ("denoiser", "a {}, and this is a {}"),
                ("config", "a model of another configuration"),
                ("dtype", "a model that computes in {}, and this one computes in {}"),
                ("adapters", "a model with other adapters that act, {}, and those of this one are {}"),
                ("weights", "a model with other weights (another checkpoint, or a LoRA that was loaded or fused)"),
                (
                    "numbers",
                    "a model with other numbers in its modules (FreeU, or the scale of an adapter) or other attention processors",
                ),
            ):
                recorded = getattr(bank.about, field)
                if recorded != found[field]:
                    raise ValueError(
                        f"{bank.path} was recorded from {what.format(recorded, found[field])}; load the model as it was, or {AGAIN}"
                    )

    def begin(self, call: Call) -> None:
        """Raises ValueError: a bank cannot be used in this call, as far as one can tell by now."""
        self._check_files()
        check_branches(call.pipe, self.family)
        self._check_model(find_denoiser(call.pipe)[0])
        self._images, self._steps, self.lacking = call.images, {}, False
        self.call = torch.zeros((), dtype=torch.int32, device=call.device)
        given = call.inputs()
        self._conditioning, self._negative, self._texts = prompt_checksum(given), "", set(given)
        self._begun, self._guided, self._compared, self._approximate = True, False, False, []
        self._clock = self.given = None
        if self.family.conditioning.cfg == "halves" and call.guided:
            self.guides()

    def guides(self) -> None:
        """The run has two branches. Raises ValueError: the banks have not."""
        self._guided = True
        if len(self.branches) == 1:
            raise ValueError(
                f"{self.banks[0].path} was recorded without classifier-free guidance, and this run guides; {AGAIN} with the "
                "guidance scale of this run, or run without guidance"
            )

    def negatives(self, encoded: Sequence[Any]) -> None:
        self._negative = encoded_checksum(encoded)

    @property
    def told(self) -> str | None:
        """What the report says of them."""
        if not self._begun:
            return None
        abouts = [bank.about for bank in self.banks]
        prompts = [repr(about.prompt) for about in abouts if about.conditioning != self._conditioning]
        negatives = [
            "none" if about.negative_prompt is None else repr(about.negative_prompt)
            for about in abouts
            if self._guided and about.negative_conditioning not in ("", self._negative)
        ]
        prompt = f"another prompt ({', '.join(prompts)})" if prompts else "this prompt"
        negative = f" {'and' if prompts else 'but'} another negative prompt ({', '.join(negatives)})" if negatives else ""
        others = f", with {' and '.join(self._approximate)}" if self._approximate else ""
        return f"recorded under {prompt}{negative}{others}"

    def check_size(self, size: Grid) -> None:
        for bank in self.banks:
            if bank.about.size != tuple(size):
                there, here = (f"{h} x {w}" for h, w in (bank.about.size, size))
                raise ValueError(
                    f"{bank.path} was recorded for latents of {there} (height, width), and those of this run are {here}; "
                    f"run at its size, or {AGAIN} with the height and width of this run"
                )

    def lay_out(self, clock: Clock) -> None:
        """The timesteps are known."""
        self._steps = {
            position: [_find(bank.about, _step_at(clock, position)) for bank in self.banks]
            for position, t in enumerate(clock.timesteps)
            if self.window[0] <= t <= self.window[1]  # type: ignore[index]
        }

    def check_schedule(self, clock: Clock) -> None:
        """Raises ValueError: a step from here on is to be merged, but a bank does not hold it.

        Some schedulers (DDIM) tell only in the first step where a run begins: :meth:`refresh` asks again then.
        """
        if not hasattr(clock.scheduler, "set_begin_index"):
            self._clock = clock
        else:
            self._check_from(clock)

    def _check_from(self, clock: Clock) -> None:
        for position, steps in self._steps.items():
            for bank, step in zip(self.banks, steps, strict=True):
                if step is None and position >= clock.position:
                    raise ValueError(self._unrecorded(bank, clock, position))

    def refresh(self) -> None:
        """The denoiser is about to be called. Raises as :meth:`check_schedule`."""
        if self._clock is not None:
            clock, self._clock = self._clock, None
            self._check_from(clock)

    def _unrecorded(self, bank: ReferenceBank, clock: Clock, position: int) -> str:
        about, t = bank.about, clock.timesteps[position]
        recorded = ", ".join(f"{step.timestep:g}" for step in about.steps)
        levels = " at this run's noise level" if any(_near(step.timestep, t) for step in about.steps) else ""
        return (
            f"this run merges at timestep {t:g}, which {bank.path} does not hold{levels}: it was recorded with the "
            f"{about.scheduler} at {recorded}; use that scheduler with the same number of steps and other settings, narrow "
            f"`timesteps` to what was recorded, or {AGAIN} with those of this run"
        )

    # --- their rows ----------------------------------------------------------------------------------------------

    def at_step(self, position: int) -> None:
        """The next call is at a position."""
        self.call.fill_(-1)
        self.lacking = None in self._steps[position]

    def rows(self, position: int, block: str) -> tuple[Tensor, ...]:
        """Of each bank ``[branches, tokens, channels]`` in the file's memory; none where the block has too coarse a grid."""
        names = [f"{step}/{block}" for step in self._steps[position]]
        there = zip(self._files, names, self._keys, strict=True)
        return tuple(file.get_tensor(name) for file, name, keys in there if name in keys)

    def allowed(self, rows: tuple[Tensor, ...]) -> Tensor | None:
        """Which of these may be matched, where all tokens were recorded: bool ``[branches, tokens]``; None if all."""
        name = f"mask/{rows[0].shape[1]}" if rows else ""
        return self._files[0].get_tensor(name).expand(len(self.branches), -1) if name in self._keys[0] else None

    def arrived(self, inputs: Mapping[str, Any]) -> None:
        """The denoiser is called. Raises RuntimeError: it is a call for which nothing was recorded."""
        further = [name for name in self.family.conditioning.perturbing if inputs.get(name)]
        if further:
            raise RuntimeError(
                f"the pipeline calls the denoiser once more in a step, with {further[0]}, for which a reference bank holds "
                "nothing; switch that guidance off, or give the picture itself (NegToMe(reference=ReferenceImage(...)))"
            )
        if self.lacking:
            raise RuntimeError(f"this step is to be merged, but was not recorded; narrow `timesteps`, or {AGAIN}")
        self.call.add_(1)
        if torch.compiler.is_compiling():
            self.given = inputs
        elif not self._compared:
            self._compare(inputs)

    def stepped(self) -> None:
        """A step is made. Raises as :meth:`arrived`, where it could not."""
        given, self.given = self.given, None
        if given is not None and not self._compared:
            self._compare(given)

    def _compare(self, inputs: Mapping[str, Any]) -> None:
        """Raises ValueError: the denoiser is told something else than for a recording; approximations are noted."""
        self._compared = True
        conditioning = self.family.conditioning
        present = branches(conditioning, len(inputs[conditioning.sample]), self._images)
        self._guided |= len(present) == 2
        told = further_inputs(inputs, conditioning, self._texts, present)
        for bank in self.banks:
            recorded = {given.name: given.checksums for given in bank.about.inputs}
            held = self.branches if conditioning.cfg == "halves" else present
            for name in sorted(told.keys() | recorded.keys()):
                then = dict(zip(held, recorded[name], strict=False)) if name in recorded else {}
                now = dict(zip(present, told[name], strict=True)) if name in told else {}
                varies = name in recorded and not recorded[name]
                if varies or (not follows_image(name) and all(then.get(branch) == now.get(branch) for branch in present)):
                    continue
                said = approximation(name)
                if said is None:
                    raise ValueError(
                        f"{bank.path} was recorded with another value of the denoiser's input {name} than this run gives it "
                        "(time_ids are original_size, crops_coords_top_left and target_size, a scale is that of adapters); call "
                        f"the pipeline as for the recording, or {AGAIN} with the arguments of this run"
                    )
                self._approximate += [said] if said not in self._approximate else []

    def table(self, base: int, rows: int) -> list[list[int]]:
        """Of each of the denoiser's rows the branch that it reads, which is counted from the first where they are calls.

        Where they are halves of the batch, they were recorded in its order. Rows beyond ``base`` are branches of methods, of
        other prompts: they read the unconditional one, if it was recorded.
        """
        if len(self.branches) == 1 and len(branches(self.family.conditioning, base, self._images)) == 2:
            self.guides()
        if not self.fit(base):
            raise RuntimeError(
                f"the denoiser is called with {base} rows for {self._images} images, so that one cannot tell which of them read "
                f"which recorded branch ({' and '.join(self.branches)}); take off what adds rows (another guidance)"
            )
        recorded = "unconditional" if "unconditional" in self.branches else "conditional"
        other = [[self.branches.index(recorded)]] * (rows - base)
        if self.by_call:
            return [[0]] * base + other
        if base == self._images:
            return [[self.branches.index("conditional")]] * base + other
        return [[0]] * self._images + [[1]] * self._images + other

    def fit(self, base: int) -> bool:
        """Whether so many rows of the pipeline's are images, each in one branch or in both."""
        halves = self.family.conditioning.cfg == "halves" and len(self.branches) == 2
        return base == self._images or (halves and base == 2 * self._images)


def prompt_checksum(conditioning: Mapping[str, Tensor]) -> str | None:
    """Of the denoiser's inputs that a prompt has become; None for several prompts."""
    if any(bool((value != value[:1]).any()) for value in conditioning.values()):
        return None
    return checksum(*(value[0] for _, value in sorted(conditioning.items())))


def encoded_checksum(encoded: Sequence[Any]) -> str:
    """Of what ``encode_prompt`` returned. What it gives every prompt counts once, however many there are."""
    return checksum(*(row for part in encoded if part is not None for row in _distinct(part)))


def _distinct(part: Any) -> Sequence[Tensor]:
    """One of the rows if all are alike. Those of a tensor are compared at once, as a device is waited for each time."""
    if isinstance(part, Tensor):
        return [part[:1] if bool((part == part[:1]).all()) else part]
    alike = all(row.shape == part[0].shape and torch.equal(row, part[0]) for row in part)
    return part[:1] if alike else part


def check_branches(pipe: Any, family: Family) -> None:
    """Raises ValueError: the pipeline's rows are not those of one of the two branches that a bank holds."""
    why = next((family.unlike[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in family.unlike), None)
    way = ""
    if why is None and getattr(pipe, "do_perturbed_attention_guidance", False):
        why, way = "its perturbed attention guidance draws every image in a third branch", "leave out pag_scale, or "
    if why is not None:
        raise ValueError(
            f"a reference bank holds what a picture is in the two branches of classifier-free guidance, and {type(pipe).__name__} "
            f"has other rows: {why}; {way}give the picture itself (NegToMe(reference=ReferenceImage(...)))"
        )


def _check_settings(bank: ReferenceBank, settings: NegToMe, sites: Sequence[Site]) -> None:
    about = bank.about
    missing = [site.name for site in sites if site.name not in about.blocks]
    if missing:
        raise ValueError(
            f"{bank.path} does not hold the block {missing[0]!r} ({len(missing)} of {len(sites)} selected blocks); select with "
            f"`blocks` those that were recorded, or {AGAIN}"
        )
    if settings.min_grid < about.min_grid:  # type: ignore[operator]
        raise ValueError(
            f"{bank.path} was recorded with min_grid={about.min_grid}, so that it lacks the coarser blocks that "
            f"min_grid={settings.min_grid} takes in; raise it, or {AGAIN}"
        )


def _branches(about: About) -> str:
    return "classifier-free guidance" if len(about.branches) > 1 else "no guidance"


def _step_at(clock: Clock, position: int) -> RecordedStep:
    return RecordedStep(clock.timesteps[position], *clock.seen(position))


def _find(about: About, sought: RecordedStep) -> int | None:
    for number, step in enumerate(about.steps):
        if all(_near(getattr(step, name), getattr(sought, name)) for name in ("timestep", "signal", "noise", "clean")):
            return number
    return None


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7)
