"""Stable Diffusion 3 and 3.5: joint blocks over images and text; in 3.5 medium some attend to the image a second time, alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from negengine.diffusers.families.family import Conditioning, Family, Grid, Latents, Site, Tokens, is_a
from negengine.diffusers.families.flux import grids


def sites(transformer: Any) -> Iterator[Site]:
    """Image tokens before the output projection, of both attentions of a block that has two."""
    for i, block in enumerate(transformer.transformer_blocks):
        for attention in ("attn", "attn2") if block.attn2 is not None else ("attn",):
            name = f"transformer_blocks.{i}.{attention}"
            yield Site(name, f"{name}.to_out.0", "input")


def size(inputs: Mapping[str, Any]) -> Grid:
    height, width = inputs["hidden_states"].shape[-2:]
    return height, width


def prompts(encoded: Sequence[Any]) -> dict[str, Tensor]:
    embeds, _, pooled, _ = encoded
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def longest(pipe: Any, length: int) -> int:
    """The tokens of CLIP come before those of T5, which alone are told their number."""
    return length - pipe.tokenizer_max_length


SD3 = Family(
    name="Stable Diffusion 3",
    component="transformer",
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3ControlNetPipeline"),
    matches=lambda module: is_a(module, "SD3Transformer2DModel"),
    tokens=Tokens(sites=sites, grids=grids),
    latents=Latents(size=size),
    conditioning=Conditioning(
        sample="hidden_states",
        batched=(
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "block_controlnet_hidden_states",
            "joint_attention_kwargs",
        ),
        prompts=prompts,
        longest=longest,
        embeds=("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
        one_sided=("ip_adapter_image", "ip_adapter_image_embeds", "skip_guidance_layers"),
        perturbing=("skip_layers",),
    ),
    # no paper gives settings for these models: those of FLUX.1
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
)
