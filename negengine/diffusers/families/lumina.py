"""Lumina-Image 2.0: blocks for the image alone, then blocks over each image behind its own text, which is not filled up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from negengine.diffusers.families.family import Conditioning, Family, Latents, Site, Tokens, is_a
from negengine.diffusers.families.flux import grids
from negengine.diffusers.families.sd3 import size

MASK = "encoder_attention_mask"


def sites(transformer: Any) -> Iterator[Site]:
    """What attention gives, before its output projection."""
    for part, text_first in (("noise_refiner", False), ("layers", True)):
        for i in range(len(getattr(transformer, part))):
            yield Site(f"{part}.{i}", f"{part}.{i}.attn.to_out.0", "input", text_first)


def text(inputs: Mapping[str, Any]) -> list[int]:
    """The denoiser leaves out what texts are filled up with."""
    return inputs[MASK].sum(1).tolist()


def prompts(encoded: Sequence[Any]) -> dict[str, Tensor]:
    embeds, mask, *_ = encoded
    return {"encoder_hidden_states": embeds, MASK: mask}


def negatives(encoded: Sequence[Any]) -> dict[str, Tensor]:
    """Without the system prompt."""
    return prompts(encoded[2:])


LUMINA = Family(
    name="Lumina-Image 2.0",
    component="transformer",
    pipelines=("Lumina2Pipeline",),
    matches=lambda module: is_a(module, "Lumina2Transformer2DModel"),
    tokens=Tokens(sites=sites, grids=grids, text=text),
    latents=Latents(size=size, negated=True),
    conditioning=Conditioning(
        sample="hidden_states",
        batched=("encoder_hidden_states", MASK, "timestep"),
        prompts=prompts,
        negatives=negatives,
        longest=None,
        mask=MASK,
        cfg="calls",
        truncates="cfg_trunc_ratio",
        embeds=("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
    ),
    # no paper gives settings for this model: those of FLUX.1
    defaults={
        "negtome": {
            "alpha": 0.9,
            "threshold": 0.65,
            "timesteps": (900, 1000),
            "blocks": ("noise_refiner", "layers"),
            "min_grid": 1,
        },
        "nag": {"scale": 5.0, "tau": 2.5, "alpha": 0.25},
    },
)
