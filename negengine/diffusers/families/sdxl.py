"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from negengine.diffusers.families.family import Conditioning, Family, is_a
from negengine.diffusers.families.unet import BATCHED, INSTRUCT, LATENTS, LEDITS, ONE_SIDED, TOKENS, distilled


def prompts(encoded: Sequence[Any]) -> dict[str, Tensor]:
    embeds, _, pooled, _ = encoded
    return {"encoder_hidden_states": embeds, "added_cond_kwargs.text_embeds": pooled}


SIZES = ("original_size", "crops_coords_top_left", "target_size", "aesthetic_score")

SDXL = Family(
    name="SDXL",
    component="unet",
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLControlNetPipeline"),
    matches=lambda module: is_a(module, "UNet2DConditionModel") and module.config.addition_embed_type == "text_time",
    tokens=TOKENS,
    latents=LATENTS,
    conditioning=Conditioning(
        sample="sample",
        batched=BATCHED,
        prompts=prompts,
        embeds=("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
        one_sided=(*ONE_SIDED, *(f"negative_{name}" for name in SIZES)),
        distilled=distilled,
    ),
    defaults={
        "negtome": {"alpha": 0.9, "threshold": 0.7, "timesteps": (800, 1000), "blocks": ("up_blocks",), "min_grid": 32},
        "nag": {"scale": 5.0, "tau": 2.5, "alpha": 0.5},
    },
    unsupported={"LEditsPPPipelineStableDiffusionXL": LEDITS},
    unlike={"StableDiffusionXLInstructPix2PixPipeline": INSTRUCT},
)
