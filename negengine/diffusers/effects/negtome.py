"""NegToMe on a denoiser: what is decided once per step, and what every block reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from negengine import ops
from negengine.diffusers.clock import Clock
from negengine.diffusers.effect import Call, Effect
from negengine.diffusers.effects.blocks import select
from negengine.diffusers.effects.pictures import Pictures
from negengine.diffusers.families import Family, Grid, Site
from negengine.diffusers.report import NegToMeReport
from negengine.diffusers.rows import Join, Rows
from negengine.methods import NegToMe
from negengine.ops import registry, verdicts
from negengine.ops.establish import settle
from negengine.reference import group_rows, is_disjoint


@dataclass
class Plan:
    """Device tensors for a batch of a given number of rows; made ahead, so that no step waits for a copy."""

    references: Tensor  # int32 [rows, K]
    table: list[int]  # its entries, known on the host
    disjoint: bool  # no image both has a reference and is one
    alphas: Tensor  # float64 [positions, rows]
    threshold: Tensor  # float64 [1]
    groups: Tensor  # int64, first row of each group
    alpha: Tensor  # of the current position


@dataclass(eq=False)
class Spot:
    """What a site has for itself: tensors, so that blocks alike may share compiled code."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.int64))  # merged, with a reference, calls
    stream: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))  # of random numbers


class NegToMeEffect(Effect[NegToMe]):
    """Pushes image tokens away from their matches at the attention outputs."""

    places_rows_first = True  # sources and pictures are one batch to the operator

    def __init__(self, settings: NegToMe, family: Family, denoiser: nn.Module, unscheduled: bool = False) -> None:
        settings = family.with_defaults(settings)
        super().__init__(settings, family, denoiser, unscheduled)
        self._sites = select(list(family.tokens.sites(denoiser)), settings.blocks or (), family)
        self.group_size = settings.group_size or 0
        self.grids: Mapping[int, Grid] = {}
        self.plans: dict[tuple[int, torch.device], Plan] = {}
        self.pictures = Pictures(settings.pictures, settings.seed, family) if settings.pictures else None
        self._spots = [Spot() for _ in self._sites]
        self._count_on(torch.device("cpu"))
        self.timesteps: list[float] = []
        self.position = 0
        self.kernels: list[ops.Verdict] = []  # on the Triton kernels, where they come into question
        self._rows, self._device = 0, torch.device("cpu")
        self._seeds = torch.full((1,), settings.seed, dtype=torch.int64)
        self.seed = self._seeds[0]

    @classmethod
    def check(cls, settings: NegToMe, family: Family, pipe: Any | None, scheduler: Any | None) -> None:
        if pipe is not None:
            if settings.pictures and getattr(pipe, "vae", None) is None:
                raise ValueError("reference pictures are encoded by the pipeline's VAE, but this pipeline has none")
            return
        if settings.group_size is None:
            raise ValueError("a bare denoiser does not tell which images share a prompt; set NegToMe(group_size=...)")
        if settings.pictures:
            raise ValueError("reference pictures need the pipeline's VAE; apply to the pipeline")
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
        modules = [(site.where, denoiser.get_submodule(site.path)) for site in self._sites]
        channels = {getattr(module, "in_features" if where == "input" else "out_dim", 0) for where, module in modules}
        self.kernels = settle(devices, dtype, settings.search, settings.matching, channels)

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
        self._rows, self._device = call.images, call.device

    def _count_on(self, device: torch.device) -> None:
        rows = torch.zeros(len(self._spots), 3, dtype=torch.int64, device=device)
        for spot, counts, stream in zip(self._spots, rows, torch.arange(len(rows), device=device), strict=True):
            spot.counts, spot.stream = counts, stream

    def sized(self, size: Grid, grids: Mapping[int, Grid]) -> None:
        self.grids = grids

    def latents_prepared(self, pipe: Any, size: Grid, device: torch.device, dtype: torch.dtype) -> None:
        if self.pictures:
            self.pictures.prepare_masks(self.grids.values(), device)
            self.pictures.encode(pipe, size, device, dtype)

    def scheduled(self, clock: Clock) -> None:
        self.timesteps = clock.timesteps
        self._seeds = self.settings.seed * 100_003 + torch.arange(len(self.timesteps)).to(self._device)
        self.plans.clear()
        if self._rows:
            for rows in (self._rows, 2 * self._rows):  # without and with classifier-free guidance in one batch
                self.plan(rows, self._device)

    def at(self, clock: Clock) -> bool:
        self.position = clock.position
        if self.unscheduled:
            return True
        if not clock.within(self.settings.timesteps):  # type: ignore[arg-type]
            return False
        self.seed = self._seeds[self.position]
        for plan in self.plans.values():
            plan.alpha = plan.alphas[self.position]
        if self.pictures and self.pictures.latents is not None:
            self.pictures.at_step(clock.seen(self.position))
        return True

    def finish(self) -> None:
        verdicts.unpin()

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
            nothing="`alpha` is 0" if self.settings.alpha == 0 else None,
        )

    # --- in the forward ------------------------------------------------------------------------------------------

    def plan(self, rows: int, device: torch.device) -> Plan:
        """The plan for ``rows`` images (without joined pictures); made on the first call, then read. A compiler can follow it."""
        key = (rows, device)
        if key not in self.plans:
            self.plans[key] = self._make_plan(rows, device)
        return self.plans[key]

    def _make_plan(self, rows: int, device: torch.device) -> Plan:
        settings, n = self.settings, self.group_size
        if rows % n:
            raise ValueError(f"group_size {n} does not divide the denoiser's batch of {rows} images")
        if self.pictures:
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
            disjoint=is_disjoint(references),
            alphas=alphas,
            threshold=torch.tensor([settings.threshold], dtype=torch.float64).to(device),
            groups=torch.arange(0, rows, n).to(device),
            alpha=alphas[min(self.position, len(alphas) - 1)],
        )

    def arrived(self, rows: Rows, device: torch.device) -> None:
        self.plan(rows.base, device)  # not in the first block, which may be compiled

    def joins(self, inputs: Mapping[str, Any], rows: Rows) -> Join | None:
        if not self.pictures:
            return None
        sample = inputs[self.family.conditioning.sample]
        return self.pictures.join(sample, self.plan(rows.base, sample.device).groups)

    def tokens(self, x: Tensor, spot: Spot, rows: Rows) -> None:
        """Merge the image tokens of one block in place."""
        settings = self.settings
        grid = self.grids.get(x.shape[1])
        if settings.min_grid > 1 and (grid is None or min(grid) < settings.min_grid):  # type: ignore[operator]
            return
        stop = self.stop if self.pictures else rows.base
        if rows.total > stop:
            x = x[:stop]
        plan = self.plan(rows.base, x.device)
        mask = None
        if self.pictures:
            mask = self.pictures.mask(grid, rows.base, len(plan.groups), x.device)  # type: ignore[arg-type]
        keep = None
        if settings.dropout:
            keep = ops.keep_tokens(len(x), x.shape[1], settings.dropout, self.seed.to(x.device), spot.stream.to(x.device))
        if spot.counts.device != x.device:  # a denoiser spread over several devices
            spot.counts = torch.zeros(3, dtype=torch.int64, device=x.device)
        ops.negtome_(
            x,
            plan.references,
            plan.alpha,
            plan.threshold,
            mask=mask,
            keep=keep,
            stats=spot.counts,
            matching=settings.matching,
            search=settings.search,
            backend=settings.backend,
            disjoint=plan.disjoint,
            # a graph is guarded by a list's values, and every other batch would compile again
            table=None if torch.compiler.is_compiling() else plan.table,
        )
