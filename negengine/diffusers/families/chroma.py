"""Chroma: the blocks of FLUX.1 without pooled text, with masked texts and classifier-free guidance in a second call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from negengine.diffusers.families.family import Conditioning, Family, Latents, Tokens, is_a
from negengine.diffusers.families.flux import grids, pack, prepared, sites, size, text


def prompts(encoded: Sequence[Any]) -> dict[str, Tensor]:
    embeds, _, mask, *_ = encoded
    return {"encoder_hidden_states": embeds} | ({} if mask is None else {"attention_mask": mask})


CHROMA = Family(
    name="Chroma",
    component="transformer",
    pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline"),
    matches=lambda module: is_a(module, "ChromaTransformer2DModel"),
    tokens=Tokens(sites=sites, grids=grids, text=text),
    latents=Latents(size=size, prepared=prepared, pack=pack),
    conditioning=Conditioning(
        sample="hidden_states",
        batched=(
            "encoder_hidden_states",
            "attention_mask",
            "timestep",
            "controlnet_block_samples",
            "controlnet_single_block_samples",
            "joint_attention_kwargs",
        ),
        prompts=prompts,
        mask="attention_mask",
        cfg="calls",
        embeds=("prompt_embeds", None, "prompt_attention_mask"),
        one_sided=tuple(f"{side}ip_adapter_image{form}" for side in ("", "negative_") for form in ("", "_embeds")),
    ),
    # no paper gives settings for this model: those of FLUX.1
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
)
