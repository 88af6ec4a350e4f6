"""One method applied to one denoiser: what is decided once per step, and what every block reads."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from negengine import ops
from negengine.diffusers.families import Family, Grid
from negengine.diffusers.pictures import Pictures, noise_levels
from negengine.diffusers.report import Status
from negengine.methods import NegToMe
from negengine.ops import verdicts
from negengine.reference import group_references, is_disjoint

logger = logging.getLogger("negengine")


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


class Run:
    """State of an applied NegToMe.

    The host's side (``begin``, ``schedule``, ``move_to``, ``stepped``) is driven by the pipeline's and the scheduler's own
    calls, outside of the denoiser. The denoiser's forward only reads: ``active``, the plan, the token grids.
    """

    def __init__(self, settings: NegToMe, family: Family, sites: int, unscheduled: bool = False) -> None:
        """``unscheduled``: nothing tells the timestep, so merging is active in every call."""
        self.settings, self.family, self.sites = settings, family, sites
        self.unscheduled = unscheduled
        self.active = unscheduled
        self.open = True  # a call of the pipeline that was applied to is running
        self.group_size = settings.group_size or 0
        self.text_tokens = 0
        self.latent_size: Grid | None = None
        self.grids: dict[int, Grid] = {}
        self.plans: dict[tuple[int, torch.device], Plan] = {}
        self.pictures = Pictures(settings.pictures, settings.seed, family) if settings.pictures else None
        self.images = 0  # rows of the call before the pictures join
        self.counts = _counters(sites, torch.device("cpu"))
        self.timesteps: list[float] = []  # of 1000
        self.position = 0
        self.steps = self.active_steps = 0
        self.kernels: list[ops.Verdict] = []  # on the Triton kernels, where they come into question
        self._rows, self._device = 0, torch.device("cpu")
        self._levels: Any = None
        self._seeds = torch.full((1,), settings.seed, dtype=torch.int64)
        self.seed = self._seeds[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        """Nothing drives a copied denoiser: its hooks stay silent."""
        twin = copy.copy(self)
        twin.active = twin.open = False
        return twin

    # --- host: once per run --------------------------------------------------------------------------------------

    def begin(self, images_per_prompt: int, rows: int, device: torch.device) -> None:
        """A pipeline call has encoded its prompts: ``rows`` = prompts x images per prompt.

        Raises:
            ValueError: the group size does not divide the batch, or alpha has another number of values than a group.
        """
        group_size = self.settings.group_size or images_per_prompt
        if rows % group_size:
            raise ValueError(
                f"group_size {group_size} does not divide this call's {rows} images; choose a divisor, or leave it out "
                "to group the images of each prompt"
            )
        self.settings.alphas(self.settings.timesteps[1], group_size)  # type: ignore[index]
        self.active = False
        self.open = True
        self.group_size = group_size
        self.timesteps, self.position = [], 0
        self.steps = self.active_steps = 0
        self.plans.clear()
        self.counts = _counters(self.sites, device)
        self._rows, self._device = rows, device

    def set_size(self, size: Grid) -> None:
        """The height and width of the latents are known."""
        self.latent_size = size
        self.grids = self.family.token_grids(*size)

    def schedule(self, scheduler: Any) -> None:
        """The scheduler has laid out its timesteps. The only read from the device, before the loop begins."""
        train = scheduler.config.num_train_timesteps
        self.timesteps = [t * 1000 / train for t in scheduler.timesteps.tolist()]
        self._levels = noise_levels(scheduler) if self.pictures else None
        self._seeds = self.settings.seed * 100_003 + torch.arange(len(self.timesteps)).to(self._device)
        self.plans.clear()
        if self._rows:
            for rows in (self._rows, 2 * self._rows):  # without and with classifier-free guidance in one batch
                self.plan(rows, self._device)
        self.move_to(0)

    # --- host: once per step -------------------------------------------------------------------------------------

    def move_to(self, position: int) -> None:
        """The next call of the denoiser is at this position of the timesteps: decide for it."""
        self.position = position
        low, high = self.settings.timesteps  # type: ignore[misc]
        self.active = self.open and position < len(self.timesteps) and low <= self.timesteps[position] <= high
        if not self.active:
            return
        self.seed = self._seeds[position]
        for plan in self.plans.values():
            plan.alpha = plan.alphas[position]
        if self.pictures and self.pictures.latents is not None:
            self.pictures.at_step(self._levels(position))

    def stepped(self, position: int) -> None:
        """The scheduler has made the step at ``position``."""
        self.steps += 1
        self.active_steps += self.active
        self.move_to(position + 1)

    # --- the denoiser's forward ----------------------------------------------------------------------------------

    def plan(self, rows: int, device: torch.device) -> Plan:
        """The plan for ``rows`` images (without joined pictures); made on the first call, then read."""
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
            references = torch.full((rows + groups * A, A), -1, dtype=torch.int32)
            for row in range(rows):
                references[row] = torch.arange(A) + rows + (row // n) * A
        else:
            references = group_references(str(settings.reference), rows, n)
        joined = len(references) - rows
        per_position = [settings.alphas(t, n) for t in self.timesteps or [1000.0]]
        alphas = torch.tensor(per_position, dtype=torch.float64).repeat(1, rows // n)
        alphas = torch.nn.functional.pad(alphas, (0, joined)).to(device)
        return Plan(
            references=references.to(device),
            table=references.flatten().tolist(),
            disjoint=is_disjoint(references),
            alphas=alphas,
            threshold=torch.tensor([settings.threshold], dtype=torch.float64).to(device),
            groups=torch.arange(0, rows, n).to(device),
            alpha=alphas[min(self.position, len(alphas) - 1)],
        )

    def enter(self, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The denoiser is called with these inputs. Returns them with the pictures joined, or None to leave them."""
        size = self.family.latent_size(inputs)
        if size is not None and size != self.latent_size:
            self.set_size(size)
        self.text_tokens = self.family.text_tokens(inputs)
        if not (self.active and self.pictures):
            return None
        sample = inputs[self.family.sample]
        self.images = len(sample)
        return self.pictures.join(inputs, self.plan(len(sample), sample.device).groups)

    def leave(self, sample: Tensor) -> Tensor:
        """The denoiser's output without the joined pictures."""
        return sample[: self.images] if self.active and self.pictures else sample

    def merge(self, x: Tensor, site: int) -> None:
        """Merge one block's image tokens ``[rows, tokens, D]`` in place."""
        settings = self.settings
        rows, tokens = x.shape[:2]
        grid = self.grids.get(tokens)
        if settings.min_grid > 1 and (grid is None or min(grid) < settings.min_grid):  # type: ignore[operator]
            return
        images = self.images if self.pictures else rows
        plan = self.plan(images, x.device)
        mask = None
        if self.pictures:
            mask = self.pictures.mask(grid, images, len(plan.groups), x.device)  # type: ignore[arg-type]
        keep = None
        if settings.dropout:
            keep = ops.keep_tokens(rows, tokens, settings.dropout, self.seed.to(x.device), site)
        if self.counts[site].device != x.device:  # a denoiser spread over several devices
            self.counts[site] = torch.zeros(3, dtype=torch.int64, device=x.device)
        ops.negtome_(
            x,
            plan.references,
            plan.alpha,
            plan.threshold,
            mask=mask,
            keep=keep,
            stats=self.counts[site],
            matching=settings.matching,
            search=settings.search,
            backend=settings.backend,
            disjoint=plan.disjoint,
            # a graph is guarded by a list's values, and every other batch would compile again
            table=None if torch.compiler.is_compiling() else plan.table,
        )

    # --- afterwards ----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """A pipeline call is over: say what it did."""
        self.active = self.open = False
        verdicts.unpin()
        status = self.status()
        logger.log(logging.WARNING if status.idle_reason else logging.INFO, "%s", status)

    def status(self) -> Status:
        counts = torch.stack([count.cpu() for count in self.counts])
        merged, eligible, _ = counts.sum(0).tolist()
        steps, active_steps = self.steps, self.active_steps
        if self.unscheduled:  # a bare denoiser: its calls are all there is to count
            steps = active_steps = int(counts[:, 2].max())
        return Status(
            method="NegToMe",
            family=self.family.name,
            blocks=self.sites,
            active_blocks=int((counts[:, 1] > 0).sum()),
            steps=steps,
            active_steps=active_steps,
            eligible_tokens=eligible,
            merged_tokens=merged,
            group_size=self.group_size,
            kernels="; ".join(map(str, self.kernels)) or None,
        )


def _counters(sites: int, device: torch.device) -> list[Tensor]:
    """For each block: merged tokens, tokens with a reference, calls."""
    return list(torch.zeros(sites, 3, dtype=torch.int64, device=device))
