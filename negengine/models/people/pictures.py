"""The 1,080 pictures: 20 professions x 3 styles x 3 genders x 6 tones, each once, 64 x 64 on white."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from negengine.models.people.attributes import GENDERS, PROFESSIONS, SIZE, STYLES, TONES

DATA = Path(__file__).parent / "data"
SHEET, LISTING = "people.webp", "people.json"


@dataclass(frozen=True)
class People:
    """Pictures ``[N, 3, 64, 64]`` in [0, 1] and their attributes ``[N, 4]`` (profession, gender, tone, style)."""

    images: Tensor
    labels: Tensor


@functools.cache
def all_people() -> People:
    """Every picture, those of a profession together, in the order of the sheet's columns: style, gender, tone.

    Raises:
        RuntimeError: the sheet is missing or cannot be read.
    """
    file = DATA / SHEET
    try:
        with Image.open(file) as sheet:
            pixels = torch.from_numpy(np.array(sheet.convert("RGB")))
    except OSError as error:
        raise RuntimeError(f"the pictures of people, {file}, cannot be read ({error}); install negengine again") from error
    tiles = pixels.unflatten(0, (-1, SIZE)).unflatten(2, (-1, SIZE)).permute(0, 2, 4, 1, 3).flatten(0, 1)
    grid = torch.cartesian_prod(*(torch.arange(len(part)) for part in (PROFESSIONS, STYLES, GENDERS, TONES)))
    if len(tiles) != len(grid):
        raise RuntimeError(f"the sheet {file} holds {len(tiles)} pictures instead of {len(grid)}; install negengine again")
    return People(tiles.float() / 255, grid[:, [0, 2, 3, 1]].contiguous())


def row_of(profession: int, gender: int, tone: int, style: int) -> int:
    """Where the picture with these attributes is."""
    return ((profession * len(STYLES) + style) * len(GENDERS) + gender) * len(TONES) + tone


@dataclass(frozen=True)
class Shift:
    """How far pictures are varied: uniform within plus or minus each value.

    Attributes:
        pixels: in each direction. scale: of the size, relative. degrees: rotation. flip: share that is mirrored.
    """

    pixels: float = 2.0
    scale: float = 0.04
    degrees: float = 0.0
    flip: float = 0.0


def vary(images: Tensor, shift: Shift, generator: torch.Generator) -> Tensor:
    """Pictures ``[N, 3, H, W]`` moved by random similarities; what comes in from outside is white."""
    n = len(images)

    def uniform(extent: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * extent

    angle, zoom = torch.deg2rad(uniform(shift.degrees)), 1 / (1 + uniform(shift.scale))
    right, down = uniform(2 * shift.pixels / images.shape[-1]), uniform(2 * shift.pixels / images.shape[-2])
    mirror = 1 - 2 * (torch.rand(n, generator=generator) < shift.flip).float()
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = torch.stack([mirror * cos, -sin, right, mirror * sin, cos, down], 1)
    grid = F.affine_grid(rows.view(n, 2, 3), list(images.shape), align_corners=False)
    return (1 + F.grid_sample(images - 1, grid, align_corners=False)).clamp(0, 1)
