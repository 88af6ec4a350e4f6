"""Guidance away from a prompt by its own prediction: negative prompting, and DNG, whose strength follows the image."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from negengine.diffusers.clock import Clock
from negengine.diffusers.effect import Call, Effect, Step
from negengine.diffusers.effects.posterior import Branches, Posterior
from negengine.diffusers.effects.transition import check_scheduler
from negengine.diffusers.families import Family
from negengine.diffusers.report import DngReport, Report
from negengine.diffusers.rows import Halves, Join, Owners, Rows, halves, of_one_length
from negengine.methods import DynamicNegativeGuidance, NegativePrompting
from negengine.methods.base import Method

logger = logging.getLogger("negengine")
Settings = TypeVar("Settings", bound=Method)


class BranchEffect(Effect[Settings]):
    """Owns the prediction: joins the rows of the prompt to avoid and, where the pipeline has none, the unconditional ones."""

    tells_branches = True

    def __init__(self, settings: Settings, family: Family, denoiser: nn.Module, unscheduled: bool = False) -> None:
        super().__init__(settings, family, denoiser, unscheduled)
        self.images, self.branches = 0, 1 if self.cfg is None else 2
        self.pipe: Callable[[], Any] = lambda: None
        self.guidance: Tensor | None = None  # [1]
        self.rescale = 0.0
        self._scale: float | None = None
        self._tells_scale = True
        self._owners: list[Owners] = []  # if the first of the pipeline's rows are conditional, and if the second half is
        self._own: dict[str, Tensor] = {}
        self._device = torch.device("cpu")

    @property
    def cfg(self) -> float | None:
        """Scale of classifier-free guidance that the method adds to the base itself."""
        return getattr(self.settings, "cfg", None)

    @classmethod
    def check(cls, settings: Settings, family: Family, pipe: Any | None, scheduler: Any | None) -> None:
        if pipe is None:
            raise ValueError(f"{settings.title} encodes a prompt and hears the scheduler's steps; apply it to the pipeline")
        if family.conditioning.cfg == "halves" and getattr(settings, "cfg", None) is not None:
            raise ValueError(f"{type(pipe).__name__} guides in its own batch; leave `cfg` out and pass guidance_scale to its call")

    # --- on the host ---------------------------------------------------------------------------------------------

    def begin(self, call: Call) -> None:
        self.check(self.settings, self.family, call.pipe, None)
        renormalises = self.family.conditioning.renormalises
        if renormalises is not None and getattr(call.pipe, f"_{renormalises}", None):
            raise ValueError(
                f"the pipeline changes the guided prediction by its norm, but {self.settings.title} decides the prediction before "
                f"that; pass {renormalises}=False"
            )
        self.pipe, self.images = weakref.ref(call.pipe), call.images
        branches = [call.encode(self.settings.prompt)]  # type: ignore[attr-defined]
        if self.cfg is not None:
            branches.append(call.encode(self.settings.cfg_prompt))  # type: ignore[attr-defined]
        if self.family.conditioning.mask is not None:
            branches = of_one_length(branches, self.family.conditioning.mask)
        self._own = {name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}
        n = call.images
        self._owners = [Owners([*rows] * len(branches), call.device) for rows in (range(n), range(n, 2 * n))]
        self._scale, self.guidance = None, None
        self._device = call.device

    def second_prompts(self) -> None:
        in_place = f", and {type(self.settings).__name__}(cfg=...) in its place" if hasattr(self.settings, "cfg") else ""
        raise ValueError(
            f"the pipeline's own true CFG calls the denoiser again for its negative prompt, but {self.settings.title} decides "
            f"the prediction in one call; pass {self.family.conditioning.scale}=1{in_place}"
        )

    def at(self, clock: Clock) -> bool:
        self.refresh()
        return True

    def refresh(self) -> None:
        """Callbacks may change the pipeline's guidance scale in mid-run."""
        pipe = self.pipe()
        self.rescale = float(getattr(pipe, "guidance_rescale", 0.0) or 0.0)
        self._tells_scale = hasattr(pipe, "guidance_scale")
        own = getattr(pipe, "guidance_scale", None)  # None where it has a place for one, and none was given
        scale = self.cfg if self.cfg is not None else 1.0 if own is None else self.family.conditioning.weight(float(own))
        if scale != self._scale:
            self._scale = scale
            self.guidance = torch.tensor([scale], dtype=torch.float64).to(self._device)

    def finish(self) -> None:
        self._own, self._owners = {}, []

    def report(self, clock: Clock) -> Report:
        nothing = "`scale` is 0" if self.settings.scale == 0 else None  # type: ignore[attr-defined]
        return Report(self.settings.title, self.family.name, clock.steps, self.active_steps, nothing=nothing)

    # --- in the forward ------------------------------------------------------------------------------------------

    def joins(self, inputs: Mapping[str, Any], rows: Rows) -> Join | None:
        further = [name for name in self.family.conditioning.perturbing if inputs.get(name)]
        if further:
            raise ValueError(
                f"the pipeline calls the denoiser once more in a step, with {further[0]}, for guidance of another kind, but "
                f"{self.settings.title} decides the prediction in one call; switch that guidance off"
            )
        conditional = self._halves(rows.base).conditional
        if rows.base > self.images and not self._tells_scale:
            raise ValueError(
                "the pipeline guides, but does not tell its scale (it has no attribute guidance_scale), which "
                f"{self.settings.title} must know to decide the prediction; pass guidance_scale=1 to its call"
            )
        return Join(self._owners[conditional.start > 0], self._own)

    def _halves(self, base: int) -> Halves:
        return halves(base, self.images, self.settings.title, self.family.conditioning)

    def told_apart(self, base: Tensor, own: Tensor) -> Branches:
        """The predictions of one call. With the pipeline's guidance rescale the conditional one is the guided and rescaled base."""
        n, found = self.images, self._halves(len(base))
        negative, unconditional, conditional = own[:n], own[n:] if self.cfg is not None else None, base[found.conditional]
        if found.unconditional is not None:
            unconditional = base[found.unconditional]
        if unconditional is None:
            return Branches(conditional, negative)
        guide_negative = getattr(self.settings, "negative", "raw") == "cfg"
        if self.rescale:
            assert self.guidance is not None
            guided = unconditional + self.guidance.to(base.dtype) * (conditional - unconditional)
            if guide_negative:
                negative = unconditional + self.guidance.to(base.dtype) * (negative - unconditional)
            return Branches(_rescaled(guided, conditional, self.rescale), negative)
        return Branches(conditional, negative, unconditional, self.guidance, guide_negative)


def _rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """As diffusers' ``rescale_noise_cfg`` (Lin et al., arXiv 2305.08891, section 3.4)."""
    dims = tuple(range(1, guided.ndim))
    factor = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return share * (guided * factor) + (1 - share) * guided


class NegativePromptingEffect(BranchEffect[NegativePrompting]):
    """``e - scale * (e_neg - e)``."""

    strength = torch.zeros(0)

    def begin(self, call: Call) -> None:
        super().begin(call)
        self.strength = torch.full((call.images,), self.settings.scale, dtype=torch.float64).to(call.device)

    def prediction(self, base: Tensor, own: Tensor) -> Tensor:
        return self.told_apart(base, own).pushed(self.strength, len(base) // self.images)


class DngEffect(BranchEffect[DynamicNegativeGuidance]):
    """The same with the strength that the posterior of what is to be avoided commands."""

    def __init__(self, settings: DynamicNegativeGuidance, family: Family, denoiser: nn.Module, unscheduled: bool = False) -> None:
        super().__init__(settings, family, denoiser, unscheduled)
        self.posterior = Posterior(settings, 0, torch.device("cpu"))
        self.strength = self.posterior.strength
        self._heard: Branches | None = None
        self._warned: str | None = None

    @classmethod
    def check(cls, settings: DynamicNegativeGuidance, family: Family, pipe: Any | None, scheduler: Any | None) -> None:
        super().check(settings, family, pipe, scheduler)
        check_scheduler(pipe.scheduler, settings.surrogate, settings.variance)  # type: ignore[union-attr]

    def reset(self) -> None:
        super().reset()
        self.posterior, self._heard = Posterior(self.settings, 0, torch.device("cpu")), None

    def begin(self, call: Call) -> None:
        super().begin(call)
        warning = check_scheduler(call.pipe.scheduler, self.settings.surrogate, self.settings.variance)
        if warning is not None and warning != self._warned:
            logger.warning("%s", warning)
        self._warned = warning
        self.posterior = Posterior(self.settings, call.images, call.device)

    def scheduled(self, clock: Clock) -> None:
        self.posterior.schedule(clock)

    def at(self, clock: Clock) -> bool:
        self.strength = self.posterior.strength
        return super().at(clock)

    def stepped(self, step: Step, clock: Clock) -> None:
        if self._heard is not None:
            branches = self._heard.of_channels(step.sample.shape[1])
            self.posterior.stepped(step.position, step.sample, branches, step.previous, clock)
        self._heard = None

    def prediction(self, base: Tensor, own: Tensor) -> Tensor:
        self._heard = self.told_apart(base, own)
        return self._heard.pushed(self.strength, len(base) // self.images)

    def report(self, clock: Clock) -> DngReport:
        about = self.settings.title, self.family.name, clock.steps, self.active_steps
        return DngReport(*about, **self.posterior.told())
