"""Guidance away from a prompt by its own prediction: negative prompting, and DNG, whose strength follows the image."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from negengine import ops
from negengine.diffusers.clock import Clock
from negengine.diffusers.effect import Call, Effect, Step
from negengine.diffusers.effects.transition import Transition, check_scheduler, clip_range, transitions
from negengine.diffusers.families import Family
from negengine.diffusers.report import DngReport, Report
from negengine.diffusers.rows import Join, Rows
from negengine.methods import DynamicNegativeGuidance, NegativePrompting
from negengine.methods.base import Method

logger = logging.getLogger("negengine")
Settings = TypeVar("Settings", bound=Method)


class BranchEffect(Effect[Settings]):
    """Owns the prediction: joins the rows of the prompt to avoid and, where the pipeline has none, the unconditional ones."""

    def __init__(self, settings: Settings, family: Family, denoiser: nn.Module, unscheduled: bool = False) -> None:
        super().__init__(settings, family, denoiser, unscheduled)
        self.images = self.active_steps = 0
        self.pipe: Callable[[], Any] = lambda: None
        self.guidance: Tensor | None = None  # [1]
        self.rescale = 0.0
        self._scale: float | None = None
        self._owners: tuple[Tensor, Tensor] | None = None
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
        self.pipe, self.images, self.active_steps = weakref.ref(call.pipe), call.images, 0
        branches = [call.encode(self.settings.prompt)]  # type: ignore[attr-defined]
        if self.cfg is not None:
            branches.append(call.encode(self.settings.cfg_prompt))  # type: ignore[attr-defined]
        self._own = {name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}
        rows = torch.arange(2 * call.images).to(call.device)
        repeated = [part.repeat(len(branches)) for part in (rows[: call.images], rows[call.images :])]
        self._owners = repeated[0], repeated[1]
        self._scale, self.guidance = None, None
        self._device = call.device

    def second_prompts(self) -> None:
        raise ValueError(
            f"the pipeline's own true CFG calls the denoiser again for its negative prompt, but {self.settings.title} decides "
            f"the prediction in one call; pass true_cfg_scale=1, and {type(self.settings).__name__}(cfg=...) in its place"
        )

    def at(self, clock: Clock) -> bool:
        """Callbacks may change the pipeline's guidance scale in mid-run."""
        pipe = self.pipe()
        self.rescale = float(getattr(pipe, "guidance_rescale", 0.0) or 0.0)
        scale = self.cfg if self.cfg is not None else float(getattr(pipe, "guidance_scale", 1.0))
        if scale != self._scale:
            self._scale = scale
            self.guidance = torch.tensor([scale], dtype=torch.float64).to(self._device)
        return True

    def stepped(self, step: Step, clock: Clock) -> None:
        self.active_steps += self.active

    def report(self, clock: Clock) -> Report:
        return Report(self.settings.title, self.family.name, clock.steps, self.active_steps)

    # --- in the forward ------------------------------------------------------------------------------------------

    def joins(self, inputs: Mapping[str, Any], rows: Rows) -> Join | None:
        assert self._owners is not None
        if rows.base not in (self.images, 2 * self.images):
            raise ValueError(
                f"the denoiser is called with {rows.base} rows for {self.images} images; {self.settings.title} knows one per image, "
                "or two with classifier-free guidance (perturbed attention and skipped layers add more: switch them off)"
            )
        return Join(self._owners[rows.base > self.images], self._own)

    def branches(self, base: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The predictions: conditional, negative, unconditional (None without classifier-free guidance), ``[images, ...]``.

        With the pipeline's guidance rescale the first is the guided and rescaled base, and the last is None.
        """
        n = self.images
        negative, unconditional = own[:n], own[n:] if self.cfg is not None else None
        if len(base) == n:
            return base, negative, unconditional
        unconditional, conditional = base[:n], base[n:]
        if self.rescale:
            assert self.guidance is not None
            guided = unconditional + self.guidance.to(base.dtype) * (conditional - unconditional)
            return _rescaled(guided, conditional, self.rescale), negative, None
        return conditional, negative, unconditional


def _rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """As diffusers' ``rescale_noise_cfg`` (Lin et al., arXiv 2305.08891, section 3.4)."""
    dims = tuple(range(1, guided.ndim))
    factor = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return share * (guided * factor) + (1 - share) * guided


Pushing = TypeVar("Pushing", NegativePrompting, DynamicNegativeGuidance)


class PushEffect(BranchEffect[Pushing]):
    """``e - strength * (e_neg - e)``, with a strength for each image."""

    strength: Tensor

    def prediction(self, base: Tensor, own: Tensor) -> Tensor:
        conditional, negative, unconditional = self.branches(base, own)
        self.heard(conditional, negative, unconditional)
        guided = self.settings.negative == "cfg" and unconditional is not None
        guidance = self.guidance if unconditional is not None else None
        copies = len(base) // self.images
        return ops.guide(conditional, negative, self.strength, unconditional, guidance, guided, copies)

    def heard(self, conditional: Tensor, negative: Tensor, unconditional: Tensor | None) -> None:
        """The predictions of this call."""


class NegativePromptingEffect(PushEffect[NegativePrompting]):
    """With a constant strength."""

    def begin(self, call: Call) -> None:
        super().begin(call)
        self.strength = torch.full((call.images,), self.settings.scale, dtype=torch.float64).to(call.device)


class DngEffect(PushEffect[DynamicNegativeGuidance]):
    """With the strength that the posterior of what is to be avoided commands; the posterior stays on the device."""

    def __init__(self, settings: DynamicNegativeGuidance, family: Family, denoiser: nn.Module, unscheduled: bool = False) -> None:
        super().__init__(settings, family, denoiser, unscheduled)
        self.log_p = torch.zeros(0)
        self.history: list[Tensor] = []
        self.clamped = self.unusable = torch.zeros(())
        self.transitions: dict[int, Transition] = {}
        self._predictions: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._begun: tuple[int, Tensor, tuple[Tensor, Tensor, Tensor | None]] | None = None
        self._warned: str | None = None
        self._means = torch.zeros(0)
        self._clip: float | None = None

    @classmethod
    def check(cls, settings: DynamicNegativeGuidance, family: Family, pipe: Any | None, scheduler: Any | None) -> None:
        super().check(settings, family, pipe, scheduler)
        check_scheduler(pipe.scheduler, settings.surrogate, settings.variance)  # type: ignore[union-attr]

    # --- on the host ---------------------------------------------------------------------------------------------

    def begin(self, call: Call) -> None:
        super().begin(call)
        settings = self.settings
        warning = check_scheduler(call.pipe.scheduler, settings.surrogate, settings.variance)
        if warning is not None and warning != self._warned:
            logger.warning("%s", warning)
        self._warned = warning
        prior = min(max(settings.prior, settings.p_min), settings.p_max)
        self.log_p = torch.full((call.images,), math.log(prior), dtype=torch.float64).to(call.device)
        self.clamped = self.unusable = torch.zeros((), dtype=torch.int64).to(call.device)
        self.history, self._begun, self._predictions = [self.log_p.exp()], None, None
        self._strengthen()

    def _strengthen(self) -> None:
        p = self.log_p.exp()
        self.strength = self.settings.scale * p / (1 - p)

    def scheduled(self, clock: Clock) -> None:
        positions = len(clock.timesteps)
        self.transitions = transitions(clock.scheduler, clock.level, positions, self.settings.variance)
        none = (0.0, 0.0, 0.0, 0.0)
        means = [self.transitions[i].means if i in self.transitions else none for i in range(positions)]
        self._means = torch.tensor(means, dtype=torch.float64).to(self._device)
        self._clip = clip_range(clock.scheduler)

    def stepped(self, step: Step, clock: Clock) -> None:
        super().stepped(step, clock)
        if not self.active or self._predictions is None:
            return
        order = getattr(clock.scheduler, "order", 1)
        if step.position % order == 0:
            self._begun = step.position, step.sample, self._predictions
        self._predictions = None
        # a step of a second-order sampler ends with its second call, the last one with its first
        ends = step.position % order == order - 1 or step.position + 1 == len(clock.timesteps)
        if ends and self._begun is not None:
            self._update(*self._begun, step.previous)
            self._begun = None

    def _update(self, position: int, sample: Tensor, predictions: tuple[Tensor, Tensor, Tensor | None], previous: Tensor) -> None:
        """What the step from ``sample`` to ``previous`` says about the avoided prompt."""
        settings, step = self.settings, self.transitions.get(position)
        if step is not None:
            conditional, negative, unconditional = predictions
            guided = settings.negative == "cfg" and unconditional is not None
            guidance = self.guidance if unconditional is not None else None
            means = self._means[position]
            gap = ops.evidence(sample, previous, conditional, negative, means, unconditional, guidance, guided, self._clip)
            found = self.log_p + (settings.delta - settings.tau * gap) / (2 * step.variance)
            usable = ~found.isnan()
            kept = torch.where(usable, found, self.log_p)
            bounded = kept.clamp(math.log(settings.p_min), math.log(settings.p_max))
            self.unusable = self.unusable + (~usable).sum()
            self.clamped = self.clamped + (kept != bounded).sum()
            self.log_p = bounded
            self._strengthen()
        self.history.append(self.log_p.exp())

    def report(self, clock: Clock) -> DngReport:
        history = torch.stack([p.cpu() for p in self.history]) if self.history else torch.zeros(0, 0)
        strength = self.settings.scale * history / (1 - history)
        return DngReport(
            method=self.settings.title,
            family=self.family.name,
            steps=clock.steps,
            active_steps=self.active_steps,
            p=tuple(map(tuple, history.tolist())),
            strength=tuple(map(tuple, strength.tolist())),
            clamped=int(self.clamped),
            unusable=int(self.unusable),
        )

    # --- in the forward ------------------------------------------------------------------------------------------

    def heard(self, conditional: Tensor, negative: Tensor, unconditional: Tensor | None) -> None:
        self._predictions = conditional, negative, unconditional
