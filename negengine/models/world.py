"""What a data set is to the models that learn it: its pictures, the words that describe them, and what the words name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor


@dataclass(frozen=True)
class World:
    """What the models of one data set have in common, apart from the pictures.

    Attributes:
        size: of a picture, in pixels.
        latent_channels: of the autoencoder. widths: its channels at each resolution, each half of the one before.
        channelwise: each latent channel has unit deviation, not only all of them together.
        attributes: what a prompt may name, and the number of values of each.
        vocabulary: every word of the prompts.
        merged_from_end: how CLIP's tokenizer puts words together, see ``text.clip_tokenizer``.
        text_length: T5 tokens of a prompt.
        naming: weight of the loss that keeps the attributes readable in what the text encoders give.
    """

    size: int
    latent_channels: int
    widths: tuple[int, ...]
    attributes: Mapping[str, int]
    vocabulary: tuple[str, ...]
    text_length: int
    merged_from_end: bool = False
    channelwise: bool = False
    naming: float = 0.0

    @property
    def latent_size(self) -> int:
        return self.size // 2 ** (len(self.widths) - 1)


class Latents(ABC):
    """Encoded pictures with the words that may describe them."""

    world: World

    @abstractmethod
    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Random scaled latents ``[batch, C, H, W]`` and a true prompt for each."""

    @abstractmethod
    def named(self, prompt: str) -> tuple[int, ...]:
        """The value of each attribute that a prompt names; the number of its values where it leaves it open."""

    def later(self) -> Latents:
        """The same pictures with the prompts of a later stage of training; the same prompts by default."""
        return self


class Pictures(ABC):
    """The pictures of a world, to train an autoencoder and then a model on its latents."""

    world: World

    @abstractmethod
    def everything(self) -> Tensor:
        """All pictures as they are, ``[N, 3, size, size]`` or one channel, in [0, 1]."""

    @abstractmethod
    def vary(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The pictures of these rows, varied."""

    @abstractmethod
    def latents(self, vae: AutoencoderKL, variants: int, seed: int) -> Latents:
        """Each picture encoded ``variants`` times: as it is, then varied."""
