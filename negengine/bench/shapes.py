"""The shapes that real models call with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One call: ``images`` of a group, the first of which is the reference of the others.

    Attributes:
        images, tokens, channels: of the attention output ``[images, tokens, channels]``.
    """

    name: str
    images: int
    tokens: int
    channels: int

    @property
    def search_flop(self) -> int:
        """Operations of the search alone: every token of the other images against every token of the first."""
        return 2 * (self.images - 1) * self.tokens**2 * self.channels

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
        """Random tokens; those of the other images are noisy, permuted copies of the first's, of which about half exceed 0.65."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(self.tokens, self.channels, generator=generator)
        images = [first]
        for _ in range(1, self.images):
            noise = torch.linspace(0.3, 2.0, self.tokens)[:, None] * torch.randn(self.tokens, self.channels, generator=generator)
            images.append(first[torch.randperm(self.tokens, generator=generator)] + noise)
        return torch.stack(images).to(device, dtype)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("sdxl-32", 4, 1024, 1280),
        Shape("sdxl-64", 4, 4096, 640),
        Shape("flux-768", 4, 2304, 3072),
        Shape("flux-1024", 4, 4096, 3072),
    )
}
