"""The guider: classifier-free guidance for the base, and a further branch that it is pushed away from."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from negengine.diffusers.clock import Clock
from negengine.diffusers.effects.posterior import Branches, Posterior
from negengine.diffusers.effects.transition import check_scheduler
from negengine.diffusers.report import DngReport, Report, Stage
from negengine.methods import DynamicNegativeGuidance, NegativePrompting
from negengine.methods.plain import as_plain, from_plain
from negengine.methods.prompts import Embeddings

logger = logging.getLogger("negengine")
Settings = DynamicNegativeGuidance | NegativePrompting


class NegativeGuider(ClassifierFreeGuidance):
    """Dynamic negative guidance, or negative prompting with a fixed strength, for the blocks of :func:`with_negative_guidance`.

    The base prediction is that of classifier-free guidance, in the window from ``start`` to ``stop``, and the conditional one
    outside; it is pushed away from the prediction for the prompt to avoid in every step, as the posterior needs every step.

    Args:
        settings: :class:`DynamicNegativeGuidance`, :class:`NegativePrompting`, or either as plain data (as in a saved config).
        guidance_scale, guidance_rescale, use_original_formulation, start, stop: as of ``ClassifierFreeGuidance``.

    Raises:
        TypeError: settings of another method.
        ValueError: a window that is empty or lies outside 0 … 1.
    """

    _input_predictions = ["pred_cond", "pred_uncond", "pred_neg"]  # noqa: RUF012 (diffusers asks for a list)

    def __init__(
        self,
        settings: Settings | Mapping[str, Any],
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        # not that of ClassifierFreeGuidance, which would register `enabled` too: every denoising loop sets that itself
        BaseGuidance.__init__(self, start, stop)
        found = from_plain(settings) if isinstance(settings, Mapping) else settings
        if not isinstance(found, Settings):
            raise TypeError(f"settings must be of DynamicNegativeGuidance or NegativePrompting, got {type(found).__name__}")
        self.settings: Settings = found
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.use_original_formulation = use_original_formulation
        self.register_to_config(
            settings=_written(found),
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            use_original_formulation=use_original_formulation,
            start=start,
            stop=stop,
        )
        self.unconditional: Mapping[str, Tensor] = {}
        self._avoided: Mapping[str, Tensor] = {}
        self._run: _Run | None = None
        self._running = self._failed = False
        self._order: list[str] = []
        self._warned: str | None = None

    @property
    def report(self) -> Report:
        """What the last run did, for DNG with the posterior and the strength of every step and image. Waits for the device."""
        if self._run is None:
            about = self.settings.title, "modular blocks", 0, 0
            dynamic = isinstance(self.settings, DynamicNegativeGuidance)
            return DngReport(*about, (), (), 0, 0, stage="new") if dynamic else Report(*about, stage="new")
        stage: Stage = "running" if self._running else "failed" if self._failed else "over"
        return dataclasses.replace(self._run.report(), stage=stage)

    # --- a run, as the blocks tell it ----------------------------------------------------------------------------

    def begin(
        self, family: str, scheduler: Any, latents: Tensor, avoided: Mapping[str, Tensor], unconditional: Mapping[str, Tensor]
    ) -> None:
        """A denoising loop is about to run, its timesteps laid out.

        Args:
            latents: ``[images, ...]``.
            avoided: the denoiser's inputs for the prompt to avoid, a row per image.
            unconditional: those of the unconditional branch, where the stock blocks have none.

        Raises:
            ValueError: the scheduler's steps have no transition density that can be followed (see ``surrogate``).
        """
        settings = self.settings
        if isinstance(settings, DynamicNegativeGuidance):
            warning = check_scheduler(scheduler, settings.surrogate, settings.variance)
            if warning is not None and warning != self._warned:
                logger.warning("%s", warning)
            self._warned = warning
        self._run = _Run(settings, family, scheduler, len(latents), latents.device)
        self._avoided, self.unconditional, self._running = avoided, unconditional, True
        self._forget_step()

    def heard_step(self, arguments: Mapping[str, Any], result: Any) -> None:
        """The scheduler has made a step."""
        if self._run is not None:
            self._run.stepped(arguments, result)

    def end(self, failed: bool) -> None:
        """The loop is over."""
        self._running, self._failed = False, failed
        self._avoided, self.unconditional = {}, {}
        self._forget_step()

    def _forget_step(self) -> None:
        """The text encoder of the next run asks for the number of branches, and must not be told that of the last step."""
        self._step = self._num_inference_steps = self._timestep = None
        self._count_prepared = 0

    # --- what diffusers asks of a guider -------------------------------------------------------------------------

    @property
    def num_conditions(self) -> int:
        """Branches of a step; outside of a run, those that the text encoder is to prepare: 2 with classifier-free guidance."""
        return 1 + self._is_cfg_enabled() + self._running

    @property
    def is_conditional(self) -> bool:
        """Whether the branch that the denoiser computes next has a prompt, the one to avoid included."""
        return self._order[self._count_prepared - 1 : self._count_prepared] != ["pred_uncond"]

    def prepare_inputs(self, data: Mapping[str, Any]) -> list[Any]:
        """One batch per branch from ``data``: by name a tensor, or a pair ``(conditional, unconditional)``."""
        if not self._running:
            raise RuntimeError(
                "NegativeGuider needs blocks that encode the prompt to avoid and hear the scheduler's steps; make it from "
                "with_negative_guidance(blocks, settings)"
            )
        branches = [self._prepare_batch(data, 0, "pred_cond")]
        if self._is_cfg_enabled():
            branches.append(self._prepare_batch(data, 1, "pred_uncond"))
        branches.append(self._prepare_batch({**data, **self._avoided}, 0, "pred_neg"))
        self._order = [getattr(branch, self._identifier_key) for branch in branches]
        return branches

    def forward(self, pred_cond: Tensor, pred_neg: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The base's prediction, pushed away from ``pred_neg``."""
        assert self._run is not None
        branches = self._branches(pred_cond, pred_neg, pred_uncond)
        return GuiderOutput(pred=self._run.pushed(branches), pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _branches(self, conditional: Tensor, negative: Tensor, unconditional: Tensor | None) -> Branches:
        if unconditional is None:
            return Branches(conditional, negative)
        if self.guidance_rescale:
            guided = super().forward(conditional, unconditional).pred
            return Branches(guided, negative)
        # the paper's formulation counts from the conditional prediction
        scale = self.guidance_scale + 1 if self.use_original_formulation else self.guidance_scale
        assert self._run is not None
        return Branches(conditional, negative, unconditional, self._run.guidance(scale), self.settings.negative == "cfg")


class _Run:
    """One run of the denoising loop."""

    def __init__(self, settings: Settings, family: str, scheduler: Any, images: int, device: torch.device) -> None:
        self._about, self._device = (settings.title, family), device
        self._clock = Clock()
        self._clock.schedule(scheduler)
        self._clock.position = getattr(scheduler, "begin_index", None) or 0
        self._posterior: Posterior | None = None
        if isinstance(settings, DynamicNegativeGuidance):
            self._posterior = Posterior(settings, images, device)
            self._posterior.schedule(self._clock)
        else:
            self._strength = torch.full((images,), settings.scale, dtype=torch.float64).to(device)
        self._guidance: tuple[float, Tensor] | None = None
        self._heard: Branches | None = None
        self._active_steps = 0

    def guidance(self, scale: float) -> Tensor:
        """``[1]``, on the device."""
        if self._guidance is None or self._guidance[0] != scale:
            self._guidance = scale, torch.tensor([scale], dtype=torch.float64).to(self._device)
        return self._guidance[1]

    def pushed(self, branches: Branches) -> Tensor:
        self._heard = branches
        return branches.pushed(self._strength if self._posterior is None else self._posterior.strength)

    def stepped(self, arguments: Mapping[str, Any], result: Any) -> None:
        clock = self._clock
        position = clock.locate(arguments["timestep"])
        if position is None:
            position = clock.position
        previous = result[0] if isinstance(result, tuple) else result.prev_sample
        clock.steps += 1
        if self._heard is not None:
            self._active_steps += 1
            if self._posterior is not None:
                self._posterior.stepped(position, arguments["sample"], self._heard, previous, clock)
        self._heard = None
        clock.position = position + 1

    def report(self) -> Report:
        about = *self._about, self._clock.steps, self._active_steps
        return Report(*about) if self._posterior is None else DngReport(*about, **self._posterior.told())


def _written(settings: Settings) -> dict[str, Any] | Settings:
    """As plain data, so that the config can be saved; as they are where they hold embeddings, which no config can."""
    embedded = any(isinstance(prompt, Embeddings) for prompt in (settings.prompt, settings.cfg_prompt))
    return settings if embedded else as_plain(settings)
