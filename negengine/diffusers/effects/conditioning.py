"""Changes of the prompt's embedding, step by step: CADS and seed variance."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from negengine.diffusers.clock import Clock
from negengine.diffusers.effect import Call, Effect
from negengine.diffusers.families import Family
from negengine.diffusers.report import Report
from negengine.diffusers.rows import Rows, halves, reach, replace
from negengine.methods import CADS, Method, SeedVariance
from negengine.ops.conditioning import cads, cads_gamma, seed_variance

Settings = TypeVar("Settings", bound=Method)


class ConditioningEffect(Effect[Settings]):
    """Edits the embeddings of the conditional rows that the pipeline passes.

    The random numbers are drawn on the device, between forwards.
    """

    tells_branches = True

    def __init__(self, settings: Settings, family: Family, denoiser: nn.Module, unscheduled: bool = False) -> None:
        super().__init__(settings, family, denoiser, unscheduled)
        self.images = 0
        self.shapes: dict[str, torch.Size] = {}
        self.random: dict[str, tuple[Tensor, ...]] = {}
        self._device = torch.device("cpu")

    @classmethod
    def check(cls, settings: Settings, family: Family, pipe: Any | None, scheduler: Any | None) -> None:
        if pipe is None:
            raise ValueError(f"a bare denoiser does not tell which rows are conditional; apply {settings.title} to the pipeline")

    def begin(self, call: Call) -> None:
        self.images, self._device = call.images, call.device
        mask = self.family.conditioning.mask
        text = {name: value.shape for name, value in call.inputs().items() if name != mask}
        self.shapes = text if self.pooled else {name: shape for name, shape in text.items() if len(shape) == 3}
        self.random = {}

    def second_prompts(self) -> None:
        if self._ragged or not self.unconditional:
            able = hasattr(self.settings, "unconditional") and not self._ragged
            both = ", or CADS(unconditional=True) to change both" if able else ""
            raise ValueError(
                f"the pipeline's true CFG calls the denoiser twice, and {self.settings.title} cannot tell the calls apart; "
                f"pass {self.family.conditioning.scale}=1{both} "
                "(DynamicNegativeGuidance and NegativePrompting have cfg=... in its place)"
            )

    @property
    def _ragged(self) -> bool:
        """Whether texts have lengths of their own, and are filled up to stand in one batch."""
        return self.family.conditioning.longest is None

    @property
    def pooled(self) -> bool:
        """Whether pooled embeddings are edited too."""
        return bool(getattr(self.settings, "pooled", False))

    @property
    def unconditional(self) -> bool:
        """Whether the unconditional rows are edited too."""
        return bool(getattr(self.settings, "unconditional", False))

    def finish(self) -> None:
        self.random = {}

    def report(self, clock: Clock) -> Report:
        zero = [name for name in ("share", "strength") if getattr(self.settings, name, 1) == 0]
        nothing = f"`{zero[0]}` is 0" if zero else None
        return Report(self.settings.title, self.family.name, clock.steps, self.active_steps, nothing=nothing)

    def inputs(self, inputs: dict[str, Any], rows: Rows) -> dict[str, Any]:
        conditional = halves(rows.base, self.images, self.settings.title, self.family.conditioning).conditional
        chosen = slice(0, rows.base) if self.unconditional else conditional
        mask = inputs.get(self.family.conditioning.mask or "") if self._ragged else None
        for name in self.shapes:
            clean = reach(inputs, name)
            part = clean[chosen]  # one row may stand for all images
            drawn = [random[: len(part), : clean.shape[1]] for random in self.random[name]]
            used = None if mask is None or clean.ndim != 3 else mask[chosen, :, None].to(clean.device, torch.bool)
            edited = self.changed(part, used, *drawn)
            whole = len(edited) == len(clean)
            inputs = replace(inputs, name, edited if whole else torch.cat([clean[: chosen.start], edited, clean[chosen.stop :]]))
        return inputs

    @abstractmethod
    def changed(self, c: Tensor, used: Tensor | None, *random: Tensor) -> Tensor:
        """``c`` changed by the random numbers of this step; ``used`` is False where a text was filled up."""

    def generator(self, position: int) -> torch.Generator:
        """The same numbers at a position, whatever ran before."""
        return torch.Generator(self._device).manual_seed((self.settings.seed * 100_003 + position) % 2**63)  # type: ignore[attr-defined]

    def drawn_rows(self, shape: torch.Size) -> tuple[int, ...]:
        """With the unconditional half there are twice as many."""
        return ((2 if self.unconditional else 1) * self.images, *shape[1:])


class CadsEffect(ConditioningEffect[CADS]):
    """Fresh noise in every step, less of it as the image forms."""

    gamma = torch.ones(())

    def at(self, clock: Clock) -> bool:
        if clock.position >= len(clock.timesteps):
            return False
        settings = self.settings
        gamma = cads_gamma(clock.timesteps[clock.position] / 1000, settings.tau1, settings.tau2)
        if gamma == 1 or not self.shapes:
            return False
        generator = self.generator(clock.position)
        rows = {name: self.drawn_rows(shape) for name, shape in self.shapes.items()}
        self.random = {name: (torch.randn(shape, generator=generator, device=self._device),) for name, shape in rows.items()}
        self.gamma = torch.tensor(gamma, dtype=torch.float64).to(self._device)
        return True

    def changed(self, c: Tensor, used: Tensor | None, *random: Tensor) -> Tensor:
        return cads(c, self.gamma, self.settings.scale, self.settings.psi, random[0], used)


class SeedVarianceEffect(ConditioningEffect[SeedVariance]):
    """The same noise in every step of the window."""

    def begin(self, call: Call) -> None:
        super().begin(call)
        generator = self.generator(0)

        def drawn(shape: torch.Size) -> Tensor:
            return torch.rand(self.drawn_rows(shape), generator=generator, device=self._device)

        self.random = {name: (drawn(shape), drawn(shape)) for name, shape in self.shapes.items()}

    def at(self, clock: Clock) -> bool:
        return clock.within(self.settings.timesteps) and bool(self.shapes)

    def changed(self, c: Tensor, used: Tensor | None, *random: Tensor) -> Tensor:
        settings = self.settings
        noise, choice = random
        return seed_variance(c, settings.share, settings.strength, noise, choice, settings.relative)
