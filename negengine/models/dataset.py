"""Batches of latents with prompts, from varied digits that are encoded once, and the task of learning to draw from them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor

from negengine.models import prompts
from negengine.models.autoencoder import encode
from negengine.models.digits import CLASSES, SIZE, Digits, Jitter, vary
from negengine.models.teaching import class_of
from negengine.models.training import Task
from negengine.models.world import Latents, Pictures, World

OPEN_SHARE = 0.15
VARIANTS = 8
WORLD = World(
    size=SIZE,
    latent_channels=4,
    widths=(16, 32),
    attributes={"digit": CLASSES},
    vocabulary=tuple(prompts.vocabulary()),
    text_length=16,
)


@dataclass(frozen=True)
class LatentDigits(Latents):
    """Scaled latents ``[variants, N, 4, 16, 16]`` of every digit with the words that may describe it."""

    latents: Tensor
    labels: Tensor
    styles: list[tuple[str, ...]]

    world = WORLD

    @staticmethod
    def of(vae: AutoencoderKL, digits: Digits, variants: int = VARIANTS, seed: int = 0) -> LatentDigits:
        """Encode each digit ``variants`` times: as it is, then varied."""
        generator = torch.Generator().manual_seed(seed)
        versions = [digits.images] + [vary(digits.images, Jitter(), generator) for _ in range(variants - 1)]
        scale = vae.config.scaling_factor
        latents = torch.stack([encode(vae, images) * scale for images in versions])
        return LatentDigits(latents, digits.labels, prompts.styles_of(digits))

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Random latents ``[batch, 4, 16, 16]`` and a true prompt for each."""
        variants, n = self.latents.shape[:2]
        rows = torch.randint(n, (batch,), generator=generator)
        versions = torch.randint(variants, (batch,), generator=generator)
        styles = [self.styles[row] for row in rows.tolist()]
        return self.latents[versions, rows], prompts.write(self.labels[rows], styles, generator, OPEN_SHARE)

    def named(self, prompt: str) -> tuple[int, ...]:
        return (class_of(prompt),)


@dataclass(frozen=True)
class DigitPictures(Pictures):
    """The digits, varied by small affine maps."""

    digits: Digits

    world = WORLD

    def everything(self) -> Tensor:
        return self.digits.images

    def vary(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        return vary(self.digits.images[rows], Jitter(), generator)

    def latents(self, vae: AutoencoderKL, variants: int, seed: int) -> LatentDigits:
        return LatentDigits.of(vae, self.digits, variants, seed)


class GeneratorTask(Task):
    """A model that learns to draw the pictures of a world from their prompts."""

    def __init__(self, data: Latents) -> None:
        super().__init__()
        self.data = data

    def prepare(self, seed: int) -> None:
        """What is learned before the training proper; nothing by default."""

    @abstractmethod
    def pipeline(self, vae: AutoencoderKL) -> DiffusionPipeline:
        """The model as it is now, as a pipeline that shares its modules."""


def keep_mask(batch: int, dropped: float, generator: torch.Generator) -> Tensor:
    """Bool ``[batch]``: false for the share whose prompt is withheld, for classifier-free guidance."""
    return torch.rand(batch, generator=generator) >= dropped
