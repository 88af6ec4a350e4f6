"""Guidance interval on a denoiser: where there is to be no guidance, both halves get the conditional prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from negengine.diffusers.clock import Clock
from negengine.diffusers.effect import Call, Effect
from negengine.diffusers.families import Family
from negengine.diffusers.report import IntervalReport
from negengine.methods import GuidanceInterval


class IntervalEffect(Effect[GuidanceInterval]):
    """Active in the steps that are not guided."""

    def __init__(self, settings: GuidanceInterval, family: Family, denoiser: nn.Module, unscheduled: bool = False) -> None:
        super().__init__(settings, family, denoiser, unscheduled)
        self.images = 0

    @classmethod
    def check(cls, settings: GuidanceInterval, family: Family, pipe: Any | None, scheduler: Any | None) -> None:
        if pipe is None:
            raise ValueError("a bare denoiser does not tell which rows are conditional; apply it to the pipeline")
        if family.conditioning.cfg == "calls":
            raise ValueError(f"the guidance interval needs classifier-free guidance in one batch, which {family.name} has not")

    def begin(self, call: Call) -> None:
        if not getattr(call.pipe, "do_classifier_free_guidance", True):
            raise ValueError("there is no classifier-free guidance in this call to be limited; raise guidance_scale")
        self.images = call.images

    def at(self, clock: Clock) -> bool:
        if clock.position >= len(clock.timesteps):
            return False
        return not self.settings.active(clock.level(clock.position).sigma)

    def report(self, clock: Clock) -> IntervalReport:
        return IntervalReport(self.settings.title, self.family.name, clock.steps, self.active_steps)

    def prediction(self, base: Tensor, own: Tensor) -> Tensor:
        conditional = base[-self.images :]
        return torch.cat([conditional] * (len(base) // self.images))
