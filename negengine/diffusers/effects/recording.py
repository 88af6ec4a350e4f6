"""Recording an asset: the denoiser is given the pictures in place of the pipeline's sample, and their tokens are written down."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from negengine.bank import BRANCHES, About, RecordedInput, RecordedStep, Writer
from negengine.diffusers.caches import cached
from negengine.diffusers.clock import Clock
from negengine.diffusers.effect import Call, Effect, Step
from negengine.diffusers.effects.banks import check_branches, encoded_checksum, prompt_checksum
from negengine.diffusers.effects.blocks import select
from negengine.diffusers.effects.inputs import branches, further_inputs
from negengine.diffusers.effects.pictures import Pictures
from negengine.diffusers.families import Family, Grid, Site
from negengine.diffusers.fingerprint import fingerprint
from negengine.diffusers.rows import Rows
from negengine.methods import NegToMe, ReferenceImage


class RecordingEffect(Effect[NegToMe]):
    """Writes the attention outputs of the pictures' tokens, block by block, in the steps in which NegToMe would act."""

    def __init__(self, settings: NegToMe, family: Family, denoiser: nn.Module, path: Path) -> None:
        super().__init__(family.with_defaults(settings), family, denoiser)
        self._sites = select(list(family.tokens.sites(denoiser)), self.settings.blocks or (), family)
        self.pictures = Pictures(settings.pictures, settings.seed, family)
        self.path = path
        self.model = fingerprint(family, denoiser)
        self.grids: Mapping[int, Grid] = {}
        self.steps: list[RecordedStep] = []
        self._size: Grid = (0, 0)
        self._position = self._calls = -1
        self._active: list[int] = []  # positions; a run may begin late, and then makes the last of them alone
        self._started = False
        self._branches: tuple[str, ...] = BRANCHES[1:]
        self._conditioning: str | None = None
        self._negative = ""
        self._texts: set[str] = set()
        self._told: dict[str, tuple[str, ...]] = {}  # in the first step
        self._varying: set[str] = set()  # of these, what is something else in another
        self._scheduler = ""
        self._writer: Writer | None = None
        self._pipe: Callable[[], Any] = lambda: None

    def sites(self) -> Iterable[Site]:
        return self._sites

    # --- on the host, between forwards ---------------------------------------------------------------------------

    def begin(self, call: Call) -> None:
        denoiser = getattr(call.pipe, self.family.component)
        if cached(denoiser):
            raise ValueError("a step cache leaves blocks out, which could not be recorded; take it off (disable_cache)")
        check_branches(call.pipe, self.family)
        self._pipe = weakref.ref(call.pipe)
        given = call.inputs()
        self._conditioning, self._texts = prompt_checksum(given), set(given)

    def second_prompts(self) -> None:
        self._branches = BRANCHES[::-1]  # the conditional call comes first

    def negatives(self, encoded: Sequence[Any]) -> None:
        self._negative = encoded_checksum(encoded)

    def sized(self, size: Grid, grids: Mapping[int, Grid]) -> None:
        self._size, self.grids = size, grids

    def latents_prepared(self, pipe: Any, size: Grid, device: torch.device, dtype: torch.dtype) -> None:
        self.pictures.prepare_masks(self.grids.values(), device)
        self.pictures.encode(pipe, size, device, dtype)

    def scheduled(self, clock: Clock) -> None:
        low, high = self.settings.timesteps  # type: ignore[misc]
        self._active = [position for position, t in enumerate(clock.timesteps) if low <= t <= high]
        if not self._active:
            raise ValueError(f"no timestep of this run lies in the window {low:g} … {high:g}; widen `timesteps`")
        self._scheduler = type(clock.scheduler).__name__

    def starting(self, clock: Clock) -> None:
        self._started = True
        self._check_start(clock)

    def _check_start(self, clock: Clock) -> None:
        """Raises ValueError: the run begins after the last step that would be recorded."""
        if clock.position > self._active[-1] and not self.steps:
            low, high = self.settings.timesteps  # type: ignore[misc]
            raise ValueError(
                f"this run begins behind the window {low:g} … {high:g}, so that there is nothing to record; widen `timesteps`, or "
                "let the run begin earlier (a larger strength)"
            )

    def at(self, clock: Clock) -> bool:
        self._position, self._calls = clock.position, -1
        if self._started:  # some schedulers (DDIM) tell only in the first step where a run begins
            self._check_start(clock)
        if self._position not in self._active or self.pictures.latents is None:
            return False
        self.pictures.at_step(clock.seen(self._position))
        return True

    def stepped(self, step: Step, clock: Clock) -> None:
        if step.position in self._active:
            self.steps.append(RecordedStep(clock.timesteps[step.position], *clock.seen(step.position)))
        pipe = self._pipe()
        if step.position >= self._active[-1] and hasattr(pipe, "_interrupt"):
            pipe._interrupt = True  # what follows would not be recorded

    # --- in the forward ------------------------------------------------------------------------------------------

    def inputs(self, inputs: dict[str, Any], rows: Rows) -> dict[str, Any]:
        """The pictures in the place of what the pipeline draws."""
        self._calls += 1
        name = self.family.conditioning.sample
        pictures = self.pictures.rows
        assert pictures is not None
        sample = inputs[name]
        if sample.shape[1:] != pictures.shape[1:]:
            raise ValueError(
                f"reference pictures become rows of shape {list(pictures.shape[1:])}, but this denoiser takes "
                f"{list(sample.shape[1:])}; inpainting and control denoisers with extra channels, and calls with images beside the "
                "one that is drawn, are not supported"
            )
        halves, rest = divmod(len(sample), len(pictures))
        if not self.steps and not self._calls and self.family.conditioning.cfg == "halves":
            self._branches = branches(self.family.conditioning, len(sample), len(pictures))
        calls = len(self._branches) if self.family.conditioning.cfg == "calls" else 1
        if rest or halves * calls != len(self._branches) or self._calls >= calls:
            raise RuntimeError(
                f"the denoiser was called with {len(sample)} rows in call {self._calls + 1} of a step, but {len(pictures)} "
                f"pictures are recorded in {len(self._branches)} branches; take off what adds rows or calls (another guidance)"
            )
        return inputs | {name: pictures.to(sample).repeat(halves, *[1] * (sample.ndim - 1))}

    def arrived(self, inputs: Mapping[str, Any], rows: Rows, device: torch.device) -> None:
        if self._calls:
            return
        conditioning = self.family.conditioning
        told = further_inputs(inputs, conditioning, self._texts, branches(conditioning, rows.base, len(self.pictures.pictures)))
        if self.steps:
            self._varying |= {name for name in told.keys() | self._told.keys() if told.get(name) != self._told.get(name)}
        self._told = told | self._told

    def tokens(self, x: Tensor, spot: int, rows: Rows) -> None:
        block, grid = self._sites[spot].name, self.grids.get(x.shape[1])
        if len(x) != rows.total or grid is None:
            raise RuntimeError(
                f"the block {block} has {len(x)} rows of {x.shape[1]} tokens, which are no whole images of this size: something "
                "parts the batch or merges tokens there; take it off, or leave the block out with `blocks`"
            )
        if min(grid) < self.settings.min_grid:  # type: ignore[operator]
            return
        number = len(self.steps)
        writer = self._writer = self._writer or Writer(self.path, len(self._branches), (len(self._active) + 1) * len(self._sites))
        pictures = len(self.pictures.pictures)
        mask = self.pictures.mask(grid, 0, 1, x.device)
        chosen = None if mask is None else mask.flatten().nonzero().flatten()
        if self.settings.matching == "release" and mask is not None:
            name = f"mask/{x.shape[1]}"
            chosen = None
            if name not in writer.whole:
                writer.put(name, mask[0])
        for half, picture_rows in enumerate(x.split(pictures)):
            tokens = picture_rows.flatten(0, 1)
            branch = self._calls if self.family.conditioning.cfg == "calls" else half
            writer.put(f"{number}/{block}", tokens if chosen is None else tokens[chosen], branch)

    # --- afterwards ----------------------------------------------------------------------------------------------

    def write(self, prompt: str, negative_prompt: str | None) -> None:
        """Raises RuntimeError: something of the run was not heard."""
        writer = self._writer
        if not self.steps:
            raise ValueError("no step of this run lies in the window; widen `timesteps`")
        if writer is None:
            raise ValueError("no selected block has a token grid of `min_grid`; lower it or select other `blocks`")
        positions = range(len(self.steps))
        heard = {name.partition("/")[2] for name in writer.whole if not name.startswith("mask/")}
        missing = {f"{step}/{block}" for step in positions for block in heard} - writer.whole
        if missing or len(self.steps) != len({name.split("/")[0] for name in writer.whole} - {"mask"}):
            raise RuntimeError(f"the recording is not whole: {len(self.steps)} steps, without {sorted(missing)[:3]}")
        settings = self.settings
        writer.finish(
            About(
                **self.model,
                pictures=tuple(map(_picture_checksum, settings.pictures)),
                masked=self.pictures.masked,
                seed=settings.seed,
                scheduler=self._scheduler,
                steps=tuple(self.steps),
                size=self._size,
                blocks=tuple(site.name for site in self._sites),
                min_grid=settings.min_grid or 1,
                matching=settings.matching,
                branches=self._branches,
                prompt=prompt,
                negative_prompt=negative_prompt,
                conditioning=self._conditioning or "",
                negative_conditioning=self._negative if len(self._branches) == 2 else "",
                inputs=tuple(
                    RecordedInput(name, () if name in self._varying else checksums)
                    for name, checksums in sorted(self._told.items())
                ),
            )
        )

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.abandon()


def _picture_checksum(picture: ReferenceImage) -> str:
    digest = hashlib.sha256(f"{picture.image.size} {picture.noise}".encode() + picture.image.convert("RGB").tobytes())
    if picture.mask is not None:
        digest.update(picture.mask.convert("L").tobytes())
    return digest.hexdigest()
