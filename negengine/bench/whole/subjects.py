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


@dataclass(frozen=True)
class Made:
    """A pipeline with random weights, which serves every size and number of images; its text encoders, where they take part."""

    pipe: Any
    encoders: list[Any]


def check_size(setting: Setting) -> None:
    """Raises ValueError: no such size, or nowhere to merge."""
    architecture = ARCHITECTURES[setting.model]
    architecture.check_size(setting.size)
    computed = footprint(architecture, setting.depth, setting.size, setting.images, setting.dtype)
    if "negtome" in setting.methods and not computed.search_flops:
        raise ValueError(
            f"NegToMe would merge nothing in {setting.model} with --images {setting.images} of {setting.size} x {setting.size}: "
            "it takes at least 2, and pictures large enough for the grids of tokens that it merges; raise --images or --size"
        )


def check_memory(setting: Setting) -> None:
    """Raises ValueError: too little memory."""
    least = 2 if "negtome" in setting.methods else 1
    needs = setting.depth, setting.size, setting.images, setting.dtype
    check_fits(ARCHITECTURES[setting.model], *needs, setting.device, setting.text_encoders, setting.vae, least)


def made(setting: Setting) -> Made:
    """The pipeline of an architecture, on the setting's device. What it needs has been checked before."""
    architecture = ARCHITECTURES[setting.model]
    with torch.no_grad(), made_on(setting.device, setting.dtype):
        vae = architecture.vae() if setting.vae else None
        encoders = architecture.encoders() if setting.text_encoders else []
        pipe = architecture.pipeline(architecture.denoiser(setting.depth), vae)
    pipe.set_progress_bar_config(disable=True)
    return Made(pipe, encoders)


def sketch(setting: Setting) -> Subject:
    """A pipeline without weights, which can be asked what methods would do to it, and not be called."""
    architecture = ARCHITECTURES[setting.model]
    with torch.no_grad(), made_on("meta", setting.dtype):
        denoiser = architecture.denoiser((1, 1))
    pipe = architecture.pipeline(denoiser, None)
    with torch.no_grad(), made_on("meta", setting.dtype):
        given = architecture.call(setting.size, setting.images, [])

    def call(**further: Any) -> object:
        raise RuntimeError("a pipeline without weights cannot draw")

    def avoid() -> negengine.Embeddings:
        return negengine.Embeddings(given["prompt_embeds"], given["pooled_prompt_embeds"])

    return Subject(pipe, call, setting.size, architecture, avoid, None)


def subject(setting: Setting, there: Made | None = None) -> Subject:
    """The pipeline of an architecture, made here or before, at the setting's size and number of images.

    Raises:
        ValueError: no such size, nowhere to merge, or too little memory, said before anything is allocated.
    """
    if there is None:
        check_size(setting)
        check_memory(setting)
        there = made(setting)
    architecture, pipe, encoders = ARCHITECTURES[setting.model], there.pipe, there.encoders
    computed = footprint(architecture, setting.depth, setting.size, setting.images, setting.dtype)
    with torch.no_grad(), made_on(setting.device, setting.dtype):
        given = architecture.call(setting.size, setting.images, [])
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
