"""Given pictures and their masks (``rag_assets``), as the release takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from negengine.methods import ReferenceImage


def given_picture(arguments: Mapping[str, Any], grid: tuple[int, int], step: int, image_processor: Any) -> ReferenceImage:
    """The picture at the generated size, with a mask of any size and any greys, of which all but black count as white.

    The release resizes a mask to the ``grid`` first (height and width; of SDXL's latents, of FLUX's tokens) and from there to each
    block. So here the mask has one grey in each square of ``step`` pixels: any further resizing sees the grid alone.

    Raises:
        TypeError: no pictures. ValueError: not one pair, or a mask that leaves nothing of the picture.
    """
    assets = arguments["rag_assets"]
    if not isinstance(assets, Sequence) or not assets:
        raise ValueError("use_rag_assets needs rag_assets=[(image, mask)]")
    if len(assets) > 1:
        raise ValueError(
            f"rag_assets takes one (image, mask) pair, got {len(assets)}: the release looks at the first alone; "
            "for several use negengine.apply with NegToMe(reference=[ReferenceImage(...), ...])"
        )
    if not isinstance(assets[0], Sequence) or len(assets[0]) != 2:
        raise ValueError(f"rag_assets must be [(image, mask)], got {assets!r}")
    image, mask = assets[0]
    for name, value, kinds in (("picture", image, Image.Image), ("mask", mask, Image.Image | None)):
        if not isinstance(value, kinds):
            raise TypeError(f"the {name} in rag_assets must be a PIL image, got {type(value).__name__}")
    height, width = grid[0] * step, grid[1] * step
    image = image_processor.resize(image.convert("RGBA" if image.has_transparency_data else "RGB"), height, width)
    mask = None if mask is None else _squares(mask, grid).resize((width, height), Image.Resampling.NEAREST)
    return ReferenceImage(image, mask, noise=bool(arguments["noise_rag"]))


def _squares(mask: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """Black or white, of the size of the grid."""
    pixels = torch.from_numpy(np.array(mask.convert("L")) != 0)[None, None].float()
    white = torch.nn.functional.interpolate(pixels, grid, mode="nearest-exact")[0, 0].byte() * 255
    if not white.any():
        raise ValueError(
            f"the mask is black at the {grid[0]} x {grid[1]} places where it is looked at, so nothing of the picture would be "
            "avoided; make its white parts larger, or give None to avoid all of the picture"
        )
    return Image.fromarray(white.numpy())
