"""Stable Diffusion 1.4, 1.5 and 2.x: the UNet of SDXL without pooled text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from negengine.diffusers.families.family import Conditioning, Family, is_a
from negengine.diffusers.families.unet import (
    BATCHED,
    GRADIENTS,
    LATENTS,
    LEDITS,
    ONE_SIDED,
    PANORAMA,
    PARADIGMS,
    SOURCE,
    TOKENS,
    TWICE,
    distilled,
)

# A UNet with one of these inputs belongs to a model that takes more than a prompt
FURTHER_INPUTS = ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds")


def matches(module: Any) -> bool:
    if not is_a(module, "UNet2DConditionModel") or any(module.config.get(name) is not None for name in FURTHER_INPUTS):
        return False
    return any(kind.startswith("CrossAttn") for kind in module.config.down_block_types)


def prompts(encoded: Sequence[Any]) -> dict[str, Tensor]:
    return {"encoder_hidden_states": encoded[0]}


SD = Family(
    name="Stable Diffusion 1.x and 2.x",
    component="unet",
    pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline"),
    matches=matches,
    tokens=TOKENS,
    latents=LATENTS,
    conditioning=Conditioning(
        sample="sample",
        batched=BATCHED,
        prompts=prompts,
        embeds=("prompt_embeds", "negative_prompt_embeds"),
        one_sided=ONE_SIDED,
        distilled=distilled,
    ),
    # no paper gives NegToMe's settings for these models: SDXL's, which have the same blocks
    defaults={
        "negtome": {"alpha": 0.9, "threshold": 0.7, "timesteps": (800, 1000), "blocks": ("up_blocks",), "min_grid": 32},
        "nag": {"scale": 5.0, "tau": 2.5, "alpha": 0.38},
    },
    unsupported={
        "LEditsPPPipelineStableDiffusion": LEDITS,
        "StableDiffusionPanoramaPipeline": PANORAMA,
        "StableDiffusionAttendAndExcitePipeline": GRADIENTS,
        "StableDiffusionPix2PixZeroPipeline": GRADIENTS,
        "StableDiffusionParadigmsPipeline": PARADIGMS,
    },
    unlike={
        "StableDiffusionSAGPipeline": TWICE,
        "StableDiffusionGLIGENTextImagePipeline": TWICE,
        "CycleDiffusionPipeline": SOURCE,
    },
)
