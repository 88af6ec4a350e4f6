"""Safe latent diffusion on a denoiser: guidance away from a concept, element by element, with momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from negengine.diffusers.clock import Clock
from negengine.diffusers.effect import Call, Step
from negengine.diffusers.effects.guidance import BranchEffect
from negengine.diffusers.families import Family
from negengine.diffusers.report import Report
from negengine.methods import SafeLatentDiffusion
from negengine.ops.safety import sld


class SafetyEffect(BranchEffect[SafeLatentDiffusion]):
    """Owns the prediction; its momentum goes from step to step."""

    def __init__(self, settings: SafeLatentDiffusion, family: Family, denoiser: nn.Module, unscheduled: bool = False) -> None:
        super().__init__(settings, family, denoiser, unscheduled)
        self.momentum: Tensor | None = None
        self.following: Tensor | None = None
        self._gates = torch.zeros(2)
        self.gate = self._gates[0]  # 0 during the warm-up, then 1
        self.taken = 0

    @classmethod
    def check(cls, settings: SafeLatentDiffusion, family: Family, pipe: Any | None, scheduler: Any | None) -> None:
        super().check(settings, family, pipe, scheduler)
        if settings.variant == "paper" and family.conditioning.cfg == "calls":
            raise ValueError(f"SLD changes classifier-free guidance, which {family.name} has not in one batch; use variant='dng'")

    def begin(self, call: Call) -> None:
        super().begin(call)
        if self.settings.variant == "paper" and not getattr(call.pipe, "do_classifier_free_guidance", True):
            raise ValueError("SLD changes classifier-free guidance, which is off here; raise guidance_scale, or use variant='dng'")
        self.momentum = self.following = None
        self._gates = torch.arange(2.0).to(call.device)
        self.taken = 0

    def at(self, clock: Clock) -> bool:
        self.gate = self._gates[int(self.taken >= self.settings.warmup)]
        active = super().at(clock)
        if self.rescale:
            raise ValueError("SLD changes the terms of classifier-free guidance; pass guidance_rescale=0")
        return active

    def stepped(self, step: Step, clock: Clock) -> None:
        self.momentum, self.taken = self.following, self.taken + 1

    def finish(self) -> None:
        super().finish()
        self.momentum = self.following = None

    def report(self, clock: Clock) -> Report:
        settings, nothing = self.settings, None
        if settings.scale == 0 or settings.outer == 0:
            nothing = "`scale` or `outer` is 0"
        elif clock.steps <= settings.warmup:
            nothing = f"the run ended within its warm-up of {settings.warmup} steps; lower `warmup`"
        active = max(self.active_steps - settings.warmup, 0)
        return Report(settings.title, self.family.name, clock.steps, active, nothing=nothing)

    def prediction(self, base: Tensor, own: Tensor) -> Tensor:
        settings = self.settings
        if settings.variant == "paper" and len(base) == self.images:
            self.following = self.momentum
            return base  # a callback has switched guidance off
        branches = self.told_apart(base, own)
        conditional, negative, unconditional = branches.conditional, branches.negative, branches.unconditional
        guidance = 1.0 if self.guidance is None else self.guidance.to(torch.promote_types(base.dtype, torch.float32))
        wide = conditional.to(torch.promote_types(base.dtype, torch.float32))
        if settings.variant == "dng" and unconditional is not None:
            wide = unconditional + guidance * (wide - unconditional)
        term, self.following = sld(
            unconditional if settings.variant == "paper" else None,
            wide,
            negative,
            self.momentum,
            scale=settings.scale,
            threshold=settings.threshold,
            momentum_scale=settings.momentum_scale,
            momentum=settings.momentum,
            variant=settings.variant,
            outer=settings.outer,
        )
        term = term * self.gate.to(term.dtype)
        if settings.variant == "dng":
            found = wide - term
        else:
            assert unconditional is not None
            found = unconditional + guidance * (wide - unconditional - term)
        return found.to(base.dtype).repeat(len(base) // self.images, *[1] * (base.ndim - 1))
