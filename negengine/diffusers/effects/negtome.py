"""NegToMe on a denoiser: what is decided once per step, and what every block reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from negengine import ops
from negengine.diffusers.clock import Clock
from negengine.diffusers.effect import Call, Effect, Step
from negengine.diffusers.effects.banks import Banks
from negengine.diffusers.effects.blocks import select
from negengine.diffusers.effects.pictures import Pictures
from negengine.diffusers.exporting import is_exporting
from negengine.diffusers.families import Family, Grid, Site
from negengine.diffusers.report import NegToMeReport
from negengine.diffusers.rows import Join, Owners, Rows, here, length
from negengine.methods import NegToMe
from negengine.ops import registry, verdicts
from negengine.ops.establish import settle
from negengine.reference import group_rows, is_disjoint

_NEEDED = ("alpha", "threshold", "timesteps", "blocks", "min_grid")  # by the family, if not by the settings


@dataclass(eq=False)
class Plan:
    """Device tensors for a batch of given numbers of rows; made ahead, so that no step waits for a copy."""

    references: Tensor  # int32 [rows, K]
    table: list[int]  # its entries, known on the host
    disjoint: bool  # no image both has a reference and is one
    alphas: Tensor  # float64 [positions, rows]
    threshold: Tensor  # float64 [1]
    owners: Owners  # of each picture's rows, those whose conditioning they take
    alpha: Tensor  # of the current position

    coarse, finest = length("_coarse"), length("_finest")  # tokens of the largest grid that is left alone, and of the finest


@dataclass(eq=False)
class Spot:
    """What a site has for itself: tensors, so that blocks alike may share compiled code."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.int64))  # merged, with a reference, calls
    stream: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))  # of random numbers
    recorded: tuple[Tensor, ...] = ()  # of each bank, [branches, tokens, D] at this step
    allowed: Tensor | None = None  # which of them may be matched


class NegToMeEffect(Effect[NegToMe]):
    """Pushes image tokens away from their matches at the attention outputs.

    Branches of guidance are merged alike, whether the pipeline passes them or a method joins them: each is groups of its own.
    """

    places_rows_first = True  # sources and pictures are one batch to the operator

    def __init__(self, settings: NegToMe, family: Family, denoiser: nn.Module, unscheduled: bool = False) -> None:
        settings = family.with_defaults(settings)
        super().__init__(settings, family, denoiser, unscheduled)
        self._sites = select(list(family.tokens.sites(denoiser)), settings.blocks or (), family)
        self.group_size = settings.group_size or 0
        self.grids: Mapping[int, Grid] = {}
        self.plans: dict[tuple[int, int, torch.device], Plan] = {}
        self.pictures = Pictures(settings.pictures, settings.seed, family) if settings.pictures else None
        self.banks = Banks(settings, self._sites, family, denoiser) if settings.banks else None
        self._spots = [Spot() for _ in self._sites]
        self._count_on(torch.device("cpu"))
        self.timesteps: list[float] = []
        self.position = 0
        self.kernels: list[ops.Verdict] = []  # on the Triton kernels, where they come into question
        self._rows, self._branches, self._device = 0, 0, torch.device("cpu")
        self._seeds = torch.full((1,), settings.seed, dtype=torch.int64)
        self.seed = self._seeds[0]

    @classmethod
    def check(cls, settings: NegToMe, family: Family, pipe: Any | None, scheduler: Any | None) -> None:
        missing = [name for name in _NEEDED if getattr(family.with_defaults(settings), name) is None]
        if missing:
            raise ValueError(f"the family {family.name} has no defaults for NegToMe's {', '.join(missing)}; give them")
        if pipe is not None:
            if settings.pictures and getattr(pipe, "vae", None) is None:
                raise ValueError("reference pictures are encoded by the pipeline's VAE, but this pipeline has none")
            return
        if settings.group_size is None:
            raise ValueError("a bare denoiser does not tell which images share a prompt; set NegToMe(group_size=...)")
        if settings.pictures:
            raise ValueError("reference pictures need the pipeline's VAE; apply to the pipeline")
        if settings.banks:
            raise ValueError("a reference bank is for the prompts, size and schedule of a pipeline's call; apply to the pipeline")
        settings = family.with_defaults(settings)
        if scheduler is None and (settings.timesteps != (0, 1000) or callable(settings.alpha)):
            raise ValueError(
                "a bare denoiser does not tell the timestep; give apply(..., scheduler=...), or NegToMe(timesteps=(0, 1000)) "
                "with a constant alpha"
            )

    @property
    def joining(self) -> bool:
        return self.pictures is not None

    def sites(self) -> Iterable[Site]:
        return self._sites

    def spot(self, number: int) -> Spot:
        return self._spots[number]

    # --- on the host, between forwards ---------------------------------------------------------------------------

    def prove(self, devices: Iterable[torch.device], dtype: torch.dtype, denoiser: nn.Module) -> None:
        """On GPUs the kernels prove themselves before they are first used."""
        settings = self.settings
        if settings.backend is not None:
            return
        modules = [(site, denoiser.get_submodule(site.path)) for site in self._sites]
        channels = {
            site.channels or getattr(module, "in_features" if site.where == "input" else "out_dim", 0) for site, module in modules
        }
        self.kernels = settle(devices, dtype, settings.search, settings.matching, channels)

    def reset(self) -> None:
        super().reset()
        self.group_size = self.settings.group_size or 0
        self._count_on(self._device)

    def begin(self, call: Call) -> None:
        """Raises ValueError: the group size does not divide the batch, or alpha has another number of values than a group."""
        settings = self.settings
        registry.choose(settings.backend, call.device, call.dtype, settings.search)  # raises before the first step
        if settings.backend is None:
            verdicts.pin()
        group_size = settings.group_size or call.images_per_prompt
        if call.images % group_size:
            raise ValueError(
                f"group_size {group_size} does not divide this call's {call.images} images; choose a divisor, or leave it out "
                "to group the images of each prompt"
            )
        settings.alphas(settings.timesteps[1], group_size)  # type: ignore[index]
        self.group_size = group_size
        self.timesteps, self.position = [], 0
        self.plans.clear()
        self._count_on(call.device)
        self._rows, self._branches, self._device = call.images, call.branches, call.device
        if self.banks:
            self.banks.begin(call)

    def second_prompts(self) -> None:
        if self.banks:
            self.banks.guides()

    def negatives(self, encoded: Sequence[Any]) -> None:
        if self.banks:
            self.banks.negatives(encoded)

    def _count_on(self, device: torch.device) -> None:
        rows = torch.zeros(len(self._spots), 3, dtype=torch.int64, device=device)
        for spot, counts, stream in zip(self._spots, rows, torch.arange(len(rows), device=device), strict=True):
            spot.counts, spot.stream = counts, stream

    def sized(self, size: Grid, grids: Mapping[int, Grid]) -> None:
        self.grids = grids
        for plan in self.plans.values():
            self._measure(plan)

    def _measure(self, plan: Plan) -> None:
        """Where something merges tokens (ToMe), a block has the coarsest grid that has as many."""
        least = self.settings.min_grid
        plan.coarse = max((tokens for tokens, grid in self.grids.items() if min(grid) < least), default=0)  # type: ignore[operator]
        plan.finest = max(self.grids, default=0)

    def latents_prepared(self, pipe: Any, size: Grid, device: torch.device, dtype: torch.dtype) -> None:
        if self.pictures:
            self.pictures.prepare_masks(self.grids.values(), device)
            self.pictures.encode(pipe, size, device, dtype)
            self.pictures.check_channels(getattr(pipe, self.family.component))
        if self.banks:
            self.banks.check_size(size)

    def scheduled(self, clock: Clock) -> None:
        self.timesteps = clock.timesteps
        self._seeds = self.settings.seed * 100_003 + torch.arange(len(self.timesteps)).to(self._device)
        self.plans.clear()
        if self.banks:
            self.banks.lay_out(clock)
        if self._rows:
            for base in (self._rows, 2 * self._rows):  # without and with classifier-free guidance in one batch
                if self.banks is None or self.banks.fit(base):
                    self.plan(base, base + self._branches * self._rows, self._device)

    def starting(self, clock: Clock) -> None:
        if self.banks:
            self.banks.check_schedule(clock)

    def refresh(self) -> None:
        if self.banks:
            self.banks.refresh()

    def stepped(self, step: Step, clock: Clock) -> None:
        if self.banks:
            self.banks.stepped()

    def at(self, clock: Clock) -> bool:
        self.position = clock.position
        if self.unscheduled:
            return True
        within = clock.within(self.settings.timesteps)  # type: ignore[arg-type]
        joins = within or (self.steady and clock.position < len(clock.timesteps))
        if joins and self.pictures and self.pictures.latents is not None:
            self.pictures.at_step(clock.seen(self.position))
        if not within:
            return False
        if self.banks:
            self._read(self.banks)
        self.seed = self._seeds[self.position]
        for plan in self.plans.values():
            plan.alpha = plan.alphas[self.position]
        return True

    def _read(self, banks: Banks) -> None:
        """Maps the rows of this step into every block's spot; the block that reads them brings them into memory."""
        banks.at_step(self.position)
        for site, spot in zip(self._sites, self._spots, strict=True):
            spot.recorded = banks.rows(self.position, site.name)
            spot.allowed = banks.allowed(spot.recorded)

    def finish(self) -> None:
        for spot in self._spots:
            spot.recorded, spot.allowed = (), None

    def report(self, clock: Clock) -> NegToMeReport:
        counts = torch.stack([spot.counts.cpu() for spot in self._spots])
        merged, eligible, _ = counts.sum(0).tolist()
        steps, active_steps = clock.steps, self.active_steps
        if self.unscheduled:  # a bare denoiser: its calls are all there is to count
            steps = active_steps = int(counts[:, 2].max())
        return NegToMeReport(
            method=self.settings.title,
            family=self.family.name,
            blocks=len(self._sites),
            active_blocks=int((counts[:, 1] > 0).sum()),
            steps=steps,
            active_steps=active_steps,
            eligible_tokens=eligible,
            merged_tokens=merged,
            group_size=self.group_size,
            kernels="; ".join(map(str, self.kernels)) or None,
            bank=self.banks.told if self.banks else None,
            nothing="`alpha` is 0" if self.settings.alpha == 0 else None,
        )

    # --- in the forward ------------------------------------------------------------------------------------------

    def plan(self, base: int, rows: int, device: torch.device) -> Plan:
        """The plan for ``rows`` images (without joined pictures), of which the pipeline passed the first ``base``.

        Made on the first call, then read. A compiler can follow it.
        """
        key = (base, rows, device)
        if key not in self.plans:
            self.plans[key] = self._make_plan(base, rows, device)
            self._measure(self.plans[key])
        return self.plans[key]

    def _make_plan(self, base: int, rows: int, device: torch.device) -> Plan:
        settings, n = self.settings, self.group_size
        if rows % n:
            raise ValueError(f"group_size {n} does not divide the denoiser's batch of {rows} images")
        if self.banks:
            references = self.banks.table(base, rows)
        elif self.pictures:
            A, groups = len(self.pictures.pictures), rows // n
            references = [[rows + row // n * A + picture for picture in range(A)] for row in range(rows)] + [[-1] * A] * (
                groups * A
            )
        else:
            references = group_rows(str(settings.reference), rows, n)
        joined = len(references) - rows
        per_position = [settings.alphas(t, n) for t in self.timesteps or [1000.0]]
        alphas = torch.tensor(per_position, dtype=torch.float64).repeat(1, rows // n)
        alphas = torch.nn.functional.pad(alphas, (0, joined)).to(device)
        return Plan(
            references=torch.tensor(references, dtype=torch.int32).to(device),
            table=[image for row in references for image in row],
            disjoint=self.banks is None and is_disjoint(references),
            alphas=alphas,
            threshold=torch.tensor([settings.threshold], dtype=torch.float64).to(device),
            owners=Owners([row for row in range(0, rows, n) for _ in range(joined * n // rows)], device),
            alpha=alphas[min(self.position, len(alphas) - 1)],
        )

    def arrived(self, inputs: Mapping[str, Any], rows: Rows, device: torch.device) -> None:
        if is_exporting() and (rows.base, rows.drawn, device) not in self.plans:
            raise RuntimeError(f"call the denoiser once with {rows.base} images on {device} before it is exported with NegToMe")
        here.plan = self.plan(rows.base, rows.drawn, device)  # not in the first block, which may be compiled
        if self.banks:
            self.banks.arrived(inputs)

    def joins(self, inputs: Mapping[str, Any], rows: Rows) -> Join | None:
        if not self.pictures:
            return None
        sample = inputs[self.family.conditioning.sample]
        return self.pictures.join(sample, self.plan(rows.base, rows.drawn, sample.device).owners)

    def tokens(self, x: Tensor, spot: Spot, rows: Rows) -> None:
        """Merge the image tokens of one block in place."""
        settings = self.settings
        if x.shape[0] != rows.total:
            x = self._whole_images(x, rows)
        plan: Plan = here.plan
        if settings.min_grid > 1 and not plan.coarse < x.shape[1] <= plan.finest:  # type: ignore[operator]
            return
        if plan.alpha.device != x.device:  # a denoiser spread over several devices
            plan = self.plan(rows.base, rows.drawn, x.device)
        if x.shape[0] > plan.references.shape[0]:
            x = x[: plan.references.shape[0]]
        bank, references, mask = None, plan.references, None
        if self.banks or self.pictures:
            bank, references, mask = self._references(x, spot, rows, plan)
        keep = None
        if settings.dropout:
            keep = ops.keep_tokens(len(x), x.shape[1], settings.dropout, self.seed.to(x.device), spot.stream.to(x.device))
        if spot.counts.device != x.device:  # a denoiser spread over several devices
            spot.counts = torch.zeros(3, dtype=torch.int64, device=x.device)
        ops.negtome_(
            x,
            references,
            plan.alpha,
            plan.threshold,
            bank=bank,
            mask=mask,
            keep=keep,
            stats=None if is_exporting() else spot.counts,  # an exported program has no report
            matching=settings.matching,
            search=settings.search,
            backend=settings.backend,
            disjoint=plan.disjoint,
            # a graph is guarded by a list's values, and every other batch would compile again
            table=plan.table if references is plan.references and not torch.compiler.is_compiling() else None,
        )

    def _references(self, x: Tensor, spot: Spot, rows: Rows, plan: Plan) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """What banks or pictures push a block's tokens away from, as operators take it: bank (None: the batch), table, mask."""
        if self.banks:
            if not spot.recorded:
                raise RuntimeError(
                    f"the reference bank holds nothing for a block with {x.shape[1]} tokens of an image: something (ToMe?) merges "
                    "tokens there; take it off, or leave the block out with `blocks`"
                )
            recorded = [tokens.to(x.device) for tokens in spot.recorded]
            bank = recorded[0] if len(recorded) == 1 else torch.cat(recorded, 1)
            references = plan.references + self.banks.call.to(x.device) if self.banks.by_call else plan.references
            return bank, references, None if spot.allowed is None else spot.allowed.to(x.device)
        assert self.pictures is not None
        if not self.pictures.masked:
            return None, plan.references, None
        if x.shape[1] not in self.grids:
            raise RuntimeError(
                f"a block has {x.shape[1]} tokens of an image, which is no grid of this size: something (ToMe?) merges tokens, "
                "and a mask cannot tell which of them it means; leave out the mask, or what merges"
            )
        grid, groups = self.grids[x.shape[1]], rows.drawn // self.group_size
        return None, plan.references, self.pictures.mask(grid, rows.drawn, groups, x.device)

    def _whole_images(self, x: Tensor, rows: Rows) -> Tensor:
        """Attention within windows (HiDiffusion) has several rows for each image, one after the other: seen as one."""
        windows, rest = divmod(len(x), rows.total)
        if rest or not windows or not x.is_contiguous():
            raise RuntimeError(
                f"an attention block has {len(x)} rows, but the denoiser was called with {rows.total}: something else parts or "
                "joins the batch there, so rows cannot be told apart; take it off, or leave these blocks out with `blocks`"
            )
        return x.view(rows.total, windows * x.shape[1], x.shape[2])
