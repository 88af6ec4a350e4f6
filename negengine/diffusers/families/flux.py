"""FLUX.1 (dev, schnell): joint blocks, then single blocks, over packed latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from negengine.diffusers.families.family import Conditioning, Family, Grid, Latents, Site, Tokens, is_a


def sites(transformer: Any) -> Iterator[Site]:
    """Joint blocks before their output projection, single blocks at the attention's output, as in the published code."""
    for i in range(transformer.config.num_layers):
        name = f"transformer_blocks.{i}"
        yield Site(name, f"{name}.attn.to_out.0", "input")
    for i in range(transformer.config.num_single_layers):
        name = f"single_transformer_blocks.{i}"
        yield Site(name, f"{name}.attn", "output", text_first=True)


def text(inputs: Mapping[str, Any]) -> int:
    return inputs["encoder_hidden_states"].shape[1]


def grids(height: int, width: int) -> dict[int, Grid]:
    """2 x 2 latents make a token."""
    return {(height // 2) * (width // 2): (height // 2, width // 2)}


def size(inputs: Mapping[str, Any]) -> None:
    """Packed latents have lost their shape."""


def prepared(pipe: Any, arguments: Mapping[str, Any], latents: Tensor) -> Grid:
    """From the size of the image, unless the latents are not packed."""
    if latents.ndim == 4:
        return latents.shape[-2], latents.shape[-1]
    step = pipe.vae_scale_factor * 2
    return 2 * (int(arguments["height"]) // step), 2 * (int(arguments["width"]) // step)


def pack(latents: Tensor) -> Tensor:
    """``[A, C, h, w] -> [A, h/2 * w/2, 4 C]``, channels before positions within a token, as the pipeline packs."""
    A, C, h, w = latents.shape
    patches = latents.view(A, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(A, (h // 2) * (w // 2), 4 * C)


def prompts(encoded: Sequence[Any]) -> dict[str, Tensor]:
    embeds, pooled, _ = encoded
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


KONTEXT = ("FluxKontextPipeline", "FluxKontextInpaintPipeline")

FLUX = Family(
    name="FLUX.1",
    component="transformer",
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxControlNetPipeline"),
    matches=lambda module: is_a(module, "FluxTransformer2DModel"),
    tokens=Tokens(sites=sites, grids=grids, text=text),
    latents=Latents(size=size, prepared=prepared, pack=pack),
    conditioning=Conditioning(
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
        prompts=prompts,
        cfg="calls",
        scale="true_cfg_scale",
        embeds=("prompt_embeds", "pooled_prompt_embeds"),
        one_sided=tuple(f"{side}ip_adapter_image{form}" for side in ("", "negative_") for form in ("", "_embeds")),
    ),
    defaults={
        "negtome": {
            "alpha": 0.9,
            "threshold": 0.65,
            "timesteps": (900, 1000),
            "blocks": ("transformer_blocks", "single_transformer_blocks"),
            "min_grid": 1,
        },
        "nag": {"scale": 5.0, "tau": 2.5, "alpha": 0.25},
    },
    unsupported=dict.fromkeys(KONTEXT, "it joins the tokens of another image to those of the image"),
)
