"""The running posterior of dynamic negative guidance, one value per image; it stays on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from negengine import ops
from negengine.diffusers.clock import Clock
from negengine.diffusers.effects.transition import Transition, clip_range, transitions
from negengine.methods import DynamicNegativeGuidance


@dataclass(frozen=True)
class Branches:
    """The denoiser's predictions in one call, ``[images, ...]`` each.

    Attributes:
        conditional: the base, or its conditional part where ``unconditional`` is given.
        negative: under the prompt to avoid.
        unconditional, guidance: of classifier-free guidance, and its scale ``[1]``; None without.
        guide_negative: whether it guides the negative prediction too.
    """

    conditional: Tensor
    negative: Tensor
    unconditional: Tensor | None = None
    guidance: Tensor | None = None
    guide_negative: bool = False

    def pushed(self, strength: Tensor, copies: int = 1) -> Tensor:
        """``e - strength (e_neg - e)``, ``copies`` times one after another. See :func:`negengine.ops.guide`."""
        return ops.guide(self.conditional, self.negative, strength, self.unconditional, self.guidance, self.guide_negative, copies)

    def of_channels(self, channels: int) -> Branches:
        """Without what a denoiser predicts beside them: a variance that it has learned, in further channels."""
        if self.conditional.shape[1] == channels:
            return self
        unconditional = None if self.unconditional is None else self.unconditional[:, :channels]
        return replace(
            self, conditional=self.conditional[:, :channels], negative=self.negative[:, :channels], unconditional=unconditional
        )


class Posterior:
    """How far each image belongs to what is avoided, and the guidance that this commands.

    Attributes:
        strength: float64 ``[images]``, ``scale * p / (1 - p)``.
        history: p before the first step and after each.
        clamped, unusable: updates (and priors) that left the bounds, and that were not a number.
    """

    def __init__(self, settings: DynamicNegativeGuidance, images: int, device: torch.device) -> None:
        self.settings, self._device = settings, device
        prior = min(max(settings.prior, settings.p_min), settings.p_max)
        self._log_p = torch.full((images,), math.log(prior), dtype=torch.float64).to(device)
        self.unusable = torch.zeros((), dtype=torch.int64).to(device)
        self.clamped = self.unusable + images * (prior != settings.prior)
        self.history = [self._p]
        self._transitions: dict[int, Transition] = {}
        self._means = torch.zeros(0)
        self._clip: float | None = None
        self._begun: tuple[int, Tensor, Branches] | None = None
        self._strengthen()

    @property
    def _p(self) -> Tensor:
        return self._log_p.exp().clamp(self.settings.p_min, self.settings.p_max)  # the logarithm rounds

    def _strengthen(self) -> None:
        p = self._p
        self.strength = self.settings.scale * p / (1 - p)

    def schedule(self, clock: Clock) -> None:
        """The timesteps are laid out."""
        positions = len(clock.timesteps)
        self._transitions = transitions(clock.scheduler, clock.level, positions, self.settings.variance)
        none = (0.0, 0.0, 0.0, 0.0)
        means = [self._transitions[i].means if i in self._transitions else none for i in range(positions)]
        self._means = torch.tensor(means, dtype=torch.float64).to(self._device)
        self._clip = clip_range(clock.scheduler)

    def stepped(self, position: int, sample: Tensor, branches: Branches, previous: Tensor, clock: Clock) -> None:
        """The scheduler's call at ``position`` has led from ``sample``, with the predictions ``branches``, to ``previous``."""
        order = getattr(clock.scheduler, "order", 1)
        if position % order == 0:
            self._begun = position, sample, branches
        # a step of a second-order sampler ends with its second call, the last one with its first
        ends = position % order == order - 1 or position + 1 == len(clock.timesteps)
        if ends and self._begun is not None:
            self._update(*self._begun, previous)
            self._begun = None

    def _update(self, position: int, sample: Tensor, branches: Branches, previous: Tensor) -> None:
        settings, step = self.settings, self._transitions.get(position)
        if step is not None:
            gap = ops.evidence(
                sample,
                previous,
                branches.conditional,
                branches.negative,
                self._means[position],
                branches.unconditional,
                branches.guidance,
                branches.guide_negative,
                self._clip,
            )
            found = self._log_p + (settings.delta - settings.tau * gap) / (2 * step.variance)
            usable = ~found.isnan()
            kept = torch.where(usable, found, self._log_p)
            self._log_p = kept.clamp(math.log(settings.p_min), math.log(settings.p_max))
            self.unusable = self.unusable + (~usable).sum()
            self.clamped = self.clamped + (kept != self._log_p).sum()
            self._strengthen()
        self.history.append(self._p)

    def told(self) -> dict[str, Any]:
        """What a report says of it; waits for the device."""
        p = torch.stack(self.history).cpu()
        strength = self.settings.scale * p / (1 - p)
        return {
            "p": tuple(map(tuple, p.tolist())),
            "strength": tuple(map(tuple, strength.tolist())),
            "clamped": int(self.clamped),
            "unusable": int(self.unusable),
        }
