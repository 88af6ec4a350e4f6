"""FLUX.1 (dev, schnell): joint blocks, then single blocks, over packed latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import FluxTransformer2DModel
from torch import Tensor

from negengine.diffusers.families import Family, Grid, Site


def sites(transformer: Any) -> Iterator[Site]:
    """Joint blocks before their output projection, single blocks at the attention's output, as in the published code."""
    for i in range(transformer.config.num_layers):
        name = f"transformer_blocks.{i}"
        yield Site(name, f"{name}.attn.to_out.0", "input")
    for i in range(transformer.config.num_single_layers):
        name = f"single_transformer_blocks.{i}"
        yield Site(name, f"{name}.attn", "output", text_first=True)


def text_tokens(inputs: Mapping[str, Any]) -> int:
    return inputs["encoder_hidden_states"].shape[1]


def token_grids(height: int, width: int) -> dict[int, Grid]:
    """2 x 2 latents make a token."""
    return {(height // 2) * (width // 2): (height // 2, width // 2)}


def pack(latents: Tensor) -> Tensor:
    """``[A, C, h, w] -> [A, h/2 * w/2, 4 C]``, channels before positions within a token, as the pipeline packs."""
    A, C, h, w = latents.shape
    patches = latents.view(A, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(A, (h // 2) * (w // 2), 4 * C)


KONTEXT = ("FluxKontextPipeline", "FluxKontextInpaintPipeline")

FLUX = Family(
    name="FLUX.1",
    component="transformer",
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxControlNetPipeline"),
    matches=lambda module: isinstance(module, FluxTransformer2DModel),
    defaults={
        "alpha": 0.9,
        "threshold": 0.65,
        "timesteps": (900, 1000),
        "blocks": ("transformer_blocks", "single_transformer_blocks"),
        "min_grid": 1,
    },
    sites=sites,
    sample="hidden_states",
    batched=(
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "guidance",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
        "joint_attention_kwargs",
    ),
    text_tokens=text_tokens,
    latent_size=lambda inputs: None,  # packed latents have lost their shape
    token_grids=token_grids,
    pack=pack,
    unsupported=dict.fromkeys(KONTEXT, "it joins the tokens of another image to those of the image"),
)
