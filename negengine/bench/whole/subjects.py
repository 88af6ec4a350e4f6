"""Pipelines that are measured: an architecture with random weights, an embedded model, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import negengine
from negengine.bench.architectures import ARCHITECTURES, Architecture, made_on
from negengine.bench.footprint import Footprint, check_fits, footprint
from negengine.bench.whole.setting import Setting
from negengine.diffusers.families import find_denoiser

PROMPT, AVOIDED = "a photo of a person", "a hat"


@dataclass
class Subject:
    """A pipeline that is measured.

    Attributes:
        call: draws once, with further arguments of the pipeline's call.
        size: pixels of a side.
        architecture, computed: None for a checkpoint, whose weights are not random.
        avoid: -> a prompt for the methods that take one.
    """

    pipe: Any
    call: Callable[..., object]
    size: int
    architecture: Architecture | None
    avoid: Callable[[], Any]
    computed: Footprint | None


def subject(setting: Setting) -> Subject:
    """The pipeline of an architecture, on the setting's device.

    Raises:
        ValueError: no such size, nowhere to merge, or too little memory, said before anything is allocated.
    """
    architecture = ARCHITECTURES[setting.model]
    architecture.check_size(setting.size)
    needs = architecture, setting.depth, setting.size, setting.images, setting.dtype
    computed = footprint(*needs)
    if "negtome" in setting.methods and not computed.search_flops:
        raise ValueError(
            f"NegToMe would merge nothing in {setting.model} with --images {setting.images} of {setting.size} x {setting.size}: "
            "it takes at least 2, and pictures large enough for the grids of tokens that it merges; raise --images or --size"
        )
    check_fits(*needs, setting.device, setting.text_encoders, setting.vae, 2 if "negtome" in setting.methods else 1)
    with torch.no_grad(), made_on(setting.device, setting.dtype):
        vae = architecture.vae() if setting.vae else None
        encoders = architecture.encoders() if setting.text_encoders else []
        pipe = architecture.pipeline(architecture.denoiser(setting.depth), vae)
        given = architecture.call(setting.size, setting.images, [])
    pipe.set_progress_bar_config(disable=True)
    latents = given["latents"]

    def call(**further: Any) -> object:
        prompts = given
        if encoders:
            with torch.no_grad(), torch.device(setting.device):
                prompts = architecture.call(setting.size, setting.images, encoders) | {"latents": latents}
        usual = {
            "height": setting.size,
            "width": setting.size,
            "num_inference_steps": setting.steps,
            "num_images_per_prompt": setting.images // len(given["prompt_embeds"]),
            "output_type": "pt" if setting.vae else "latent",
            "generator": torch.Generator(setting.device).manual_seed(0),
        }
        return pipe(**usual | prompts | further)

    def avoid() -> negengine.Embeddings:
        generator = torch.Generator(setting.device).manual_seed(1)

        def other(name: str) -> torch.Tensor:
            like = given[name]
            return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

        return negengine.Embeddings(other("prompt_embeds"), other("pooled_prompt_embeds"))

    return Subject(pipe, call, setting.size, architecture, avoid, computed)


def checkpoint(setting: Setting, pipe: Any, usual: Mapping[str, Any]) -> Subject:
    """A pipeline with weights and text encoders of its own.

    Args:
        usual: arguments of its call that a model is made for; the setting's size if there are none.

    Raises:
        TypeError: it is of no family that negengine knows.
    """
    find_denoiser(pipe)
    pipe.set_progress_bar_config(disable=True)
    usual = dict(usual) or {"height": setting.size, "width": setting.size}
    usual |= {
        "num_inference_steps": setting.steps,
        "num_images_per_prompt": setting.images,
        "output_type": "pt" if setting.vae else "latent",
    }

    def call(**further: Any) -> object:
        generator = torch.Generator(setting.device).manual_seed(0)
        return pipe(**usual | {"prompt": PROMPT, "generator": generator} | further)

    return Subject(pipe, call, usual["height"], None, lambda: AVOIDED, None)
