"""Guidance interval on a denoiser: where there is to be no guidance, both halves get the conditional prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from negengine.diffusers.clock import Clock
from negengine.diffusers.effect import Call, Effect, Step
from negengine.diffusers.families import Family
from negengine.diffusers.report import IntervalReport
from negengine.diffusers.rows import Rows, halves
from negengine.methods import GuidanceInterval


class IntervalEffect(Effect[GuidanceInterval]):
    """Active in all steps: outside the interval it takes guidance off, and everywhere it sees whether the pipeline guides.

    Pipelines need not guide in every step: Z-Image's `cfg_truncation` ends it, and callbacks may.
    """

    tells_branches = True

    def __init__(self, settings: GuidanceInterval, family: Family, denoiser: nn.Module, unscheduled: bool = False) -> None:
        super().__init__(settings, family, denoiser, unscheduled)
        self.images = self.guided_steps = self.limited_steps = 0
        self.limits = self._guided = False

    @classmethod
    def check(cls, settings: GuidanceInterval, family: Family, pipe: Any | None, scheduler: Any | None) -> None:
        if pipe is None:
            raise ValueError("a bare denoiser does not tell which rows are conditional; apply it to the pipeline")
        if family.conditioning.cfg == "calls":
            raise ValueError(f"the guidance interval needs classifier-free guidance in one batch, which {family.name} has not")

    def reset(self) -> None:
        super().reset()
        self.guided_steps = self.limited_steps = 0
        self._guided = False

    def begin(self, call: Call) -> None:
        if not getattr(call.pipe, "do_classifier_free_guidance", True):
            raise ValueError("there is no classifier-free guidance in this call to be limited; raise guidance_scale")
        self.images = call.images

    def at(self, clock: Clock) -> bool:
        if clock.position >= len(clock.timesteps):
            return False
        self.limits = not self.settings.active(clock.level(clock.position).sigma)
        return True

    def stepped(self, step: Step, clock: Clock) -> None:
        self.limited_steps += self._guided and self.limits
        self.guided_steps += self._guided and not self.limits
        self._guided = False

    def report(self, clock: Clock) -> IntervalReport:
        about = self.settings.title, self.family.name, clock.steps, self.limited_steps
        return IntervalReport(*about, guided_steps=self.guided_steps)

    def arrived(self, inputs: Mapping[str, Any], rows: Rows, device: torch.device) -> None:
        if rows.base > self.images:  # a step may have further calls, with one row per image
            self._guided = True

    def prediction(self, base: Tensor, own: Tensor) -> Tensor:
        if not self.limits:
            return base
        conditional = base[halves(len(base), self.images, self.settings.title, self.family.conditioning).conditional]
        return torch.cat([conditional] * (len(base) // self.images))
