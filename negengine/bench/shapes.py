"""The shapes that real models call with, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = {"half": (0.3, 2.0), "all": (0.3, 0.3)}  # standard deviations, from the first token to the last
GATES = (*NOISE, "none")


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

    def merge_bytes(self, dtype: torch.dtype, share: float) -> float:
        """Bytes of merging a ``share`` of the tokens in place: they are read and written, the reference is read once."""
        merged = share * (self.images - 1) * self.tokens
        return (2 * merged + self.tokens * min(1.0, merged)) * self.channels * dtype.itemsize

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0, gate: str = "half") -> Tensor:
        """Random tokens ``[images, tokens, channels]``, never zeros.

        Args:
            gate: which share of the tokens of the other images resembles one of the first by more than 0.65: about ``"half"``
                (permuted copies, with more noise from token to token), ``"all"`` (with little noise), ``"none"`` (unrelated).
        """
        generator = torch.Generator().manual_seed(seed)
        images = [torch.randn(self.tokens, self.channels, generator=generator)]
        for _ in range(1, self.images):
            own = torch.randn(self.tokens, self.channels, generator=generator)
            if gate != "none":
                noise = torch.linspace(*NOISE[gate], self.tokens)[:, None]
                own = images[0][torch.randperm(self.tokens, generator=generator)] + noise * own
            images.append(own)
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

# One size grows, the others stay at those of SCALING_BASE.
SCALING_BASE = Shape("base", 4, 1024, 640)
SCALING = {
    "N": tuple(Shape(f"N={n}", n, 1024, 640) for n in (2, 4, 8, 16)),
    "T": tuple(Shape(f"T={t}", 4, t, 640) for t in (256, 512, 1024, 2048, 4096, 8192, 16384)),
    "D": tuple(Shape(f"D={d}", 4, 1024, d) for d in (64, 128, 256, 512, 1024, 2048, 4096)),
}


def shape_named(name: str) -> Shape:
    """A shape of ``SHAPES``, or the one whose images, tokens and channels the name spells, like ``4x1024x640``.

    Raises:
        ValueError: it is neither.
    """
    if name in SHAPES:
        return SHAPES[name]
    sizes = name.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(
            f"unknown shape {name!r}; there are {', '.join(SHAPES)}, or any as IMAGESxTOKENSxCHANNELS, like 4x1024x640"
        )
    return Shape(name, *map(int, sizes))
