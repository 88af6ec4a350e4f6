"""What the UNets of Stable Diffusion have in common: attention at several resolutions, text through cross-attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from negengine.diffusers.families.family import Grid, Latents, Site, Tokens

LEVELS = 8  # halvings looked at; more than any UNet has
BATCHED = (
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
)


LEDITS = "its batch has rows for every edit"
PANORAMA = "it calls the denoiser with parts of the image"
GRADIENTS = "it needs gradients through the denoiser"
PARADIGMS = "it draws several steps in one call of the denoiser, so that no call has a timestep of its own"
INSTRUCT = "it guides by the text and by the image to be edited, which takes three rows for each image"
TWICE = "it calls the denoiser a second time in each step, for guidance of its own"
SOURCE = "its batch has the rows of another prompt, the source's"

ONE_SIDED = ("ip_adapter_image", "ip_adapter_image_embeds", "guess_mode")  # image prompts, and control of one half


def distilled(pipe: Any) -> bool:
    """Latent consistency models."""
    return pipe.unet.config.get("time_cond_proj_dim") is not None


def _attentions(unet: nn.Module, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Paths in order of execution."""
    for part in ("down_blocks", "mid_block", "up_blocks"):
        for name, _ in getattr(unet, part).named_modules(prefix=part):
            if name.endswith(suffixes):
                yield name


def sites(unet: nn.Module) -> Iterator[Site]:
    """Self- and cross-attention, after the output projection."""
    return (Site(name, name, "output") for name in _attentions(unet, (".attn1", ".attn2")))


def cross(unet: nn.Module) -> Iterator[str]:
    return _attentions(unet, (".attn2",))


def grids(height: int, width: int) -> dict[int, Grid]:
    """Every level halves the grid, rounding up."""
    found: dict[int, Grid] = {}
    for level in range(LEVELS):
        grid = math.ceil(height / 2**level), math.ceil(width / 2**level)
        found.setdefault(grid[0] * grid[1], grid)
    return found


def size(inputs: Mapping[str, Any]) -> Grid:
    height, width = inputs["sample"].shape[-2:]
    return height, width


TOKENS = Tokens(sites=sites, grids=grids, cross=cross)  # text enters through cross-attention only
LATENTS = Latents(size=size)
