"""Stable Diffusion XL: attention at several resolutions of a UNet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from negengine.diffusers.families import Family, Grid, Site

LEVELS = 8  # halvings looked at; more than any UNet has


def sites(unet: nn.Module) -> Iterator[Site]:
    """Self- and cross-attention, after the output projection, in order of execution."""
    for part in ("down_blocks", "mid_block", "up_blocks"):
        for name, _ in getattr(unet, part).named_modules(prefix=part):
            if name.endswith((".attn1", ".attn2")):
                yield Site(name, name, "output")


def latent_size(inputs: Mapping[str, Any]) -> Grid:
    height, width = inputs["sample"].shape[-2:]
    return height, width


def token_grids(height: int, width: int) -> dict[int, Grid]:
    """Every level halves the grid, rounding up."""
    grids: dict[int, Grid] = {}
    for level in range(LEVELS):
        grid = math.ceil(height / 2**level), math.ceil(width / 2**level)
        grids.setdefault(grid[0] * grid[1], grid)
    return grids


SDXL = Family(
    name="SDXL",
    component="unet",
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLControlNetPipeline"),
    matches=lambda module: isinstance(module, UNet2DConditionModel) and module.config.addition_embed_type == "text_time",
    defaults={
        "alpha": 0.9,
        "threshold": 0.7,
        "timesteps": (800, 1000),
        "blocks": ("up_blocks",),
        "min_grid": 32,
    },
    sites=sites,
    sample="sample",
    batched=(
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "cross_attention_kwargs",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "encoder_attention_mask",
    ),
    text_tokens=lambda inputs: 0,  # text enters through cross-attention only
    latent_size=latent_size,
    token_grids=token_grids,
    pack=lambda latents: latents,
)
