"""Qwen-Image: joint blocks over packed latents and texts of any length, which are filled up and masked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from negengine.diffusers.families.family import (
    Conditioning,
    Family,
    Grid,
    Latents,
    Site,
    Tokens,
    as_pixels,
    is_a,
    normalised,
)
from negengine.diffusers.families.flux import grids, pack, prepared

if TYPE_CHECKING:
    from PIL import Image


def sites(transformer: Any) -> Iterator[Site]:
    """Image tokens before the output projection."""
    for i in range(len(transformer.transformer_blocks)):
        name = f"transformer_blocks.{i}"
        yield Site(name, f"{name}.attn.to_out.0", "input")


def size(inputs: Mapping[str, Any]) -> Grid:
    """2 x 2 latents make a token, and the denoiser is told the grid of the tokens, alone or in a list of one."""
    shape = inputs["img_shapes"][0]
    _, height, width = shape[0] if isinstance(shape, list) else shape
    return 2 * height, 2 * width


def encode(pipe: Any, pictures: Sequence[Image.Image], size: Grid, device: torch.device) -> Tensor:
    """As :func:`encode_pictures`, with a VAE of videos: a picture is a video of one frame."""
    vae, frames = pipe.vae, as_pixels(pipe, pictures, size).unsqueeze(2)
    with torch.no_grad():
        clean = vae.encode(frames.to(device, vae.dtype)).latent_dist.mode().squeeze(2)
    return normalised(clean.float(), vae.config)


def prompts(encoded: Sequence[Any]) -> dict[str, Tensor]:
    embeds, mask = encoded
    return {"encoder_hidden_states": embeds} | ({} if mask is None else {"encoder_hidden_states_mask": mask})


EDITING = ("", "Inpaint", "Plus")
OTHERS = (*(f"QwenImageEdit{kind}Pipeline" for kind in EDITING), "QwenImageLayeredPipeline")

QWEN = Family(
    name="Qwen-Image",
    component="transformer",
    pipelines=("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageControlNetPipeline"),
    matches=lambda module: is_a(module, "QwenImageTransformer2DModel"),
    tokens=Tokens(sites=sites, grids=grids),
    latents=Latents(size=size, prepared=prepared, pack=pack, encode=encode),
    conditioning=Conditioning(
        sample="hidden_states",
        batched=(
            "encoder_hidden_states",
            "encoder_hidden_states_mask",
            "timestep",
            "guidance",
            "attention_kwargs",
            "controlnet_block_samples",
        ),
        prompts=prompts,
        longest=None,
        mask="encoder_hidden_states_mask",
        cfg="calls",
        scale="true_cfg_scale",
        embeds=("prompt_embeds", "prompt_embeds_mask"),
    ),
    # no paper gives settings for this model: those of FLUX.1
    defaults={
        "negtome": {
            "alpha": 0.9,
            "threshold": 0.65,
            "timesteps": (900, 1000),
            "blocks": ("transformer_blocks",),
            "min_grid": 1,
        },
        "nag": {"scale": 5.0, "tau": 2.5, "alpha": 0.25},
    },
    unsupported=dict.fromkeys(OTHERS, "it joins the tokens of other images to those of the image"),
)
