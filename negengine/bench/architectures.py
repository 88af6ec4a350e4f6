"""FLUX.1-dev and SDXL-base from their public configurations, with random weights: time does not depend on the weights."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from negengine.bench.stacks import alike

Inputs = dict[str, Any]

FLUX_DEV = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
FLUX_SCHEDULER = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SDXL_BASE = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
SDXL_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 1024,
}
FLUX_VAE = VAE | {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
SDXL_VAE = VAE | {"latent_channels": 4, "scaling_factor": 0.13025}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
CLIP_TOKENS, T5_TOKENS = 77, 512


@dataclass(frozen=True)
class Architecture:
    """A model as published.

    Attributes:
        component: the pipeline's attribute that holds the denoiser.
        full: its depth: FLUX.1's joint and single blocks; SDXL's transformer layers at its two lower levels.
        steps, active: of a picture in the NegToMe paper, and how many of them merge.
        halves: rows of the denoiser's batch per image: 2 with classifier-free guidance in one batch.
        stride: pixels of a side that make a token of the finest grid; sizes are multiples of it.
        denoiser: depth -> the denoiser.
        inputs: size, images -> inputs of one forward of it. Called within :func:`made_on`.
        pipeline: denoiser, VAE -> the pipeline, without text encoders.
        vae: -> the VAE. upcasts: whether the pipeline decodes in float32 where the models are in float16.
        encoders: -> the text encoders.
        call: size, images, encoders -> what the pipeline's call takes in the place of a prompt. Called within :func:`made_on`.
        timesteps: size, steps -> at which the pipeline calls the denoiser.
    """

    name: str
    component: str
    full: tuple[int, int]
    steps: int
    active: int
    halves: int
    stride: int
    denoiser: Callable[[tuple[int, int]], nn.Module]
    inputs: Callable[[int, int], Inputs]
    pipeline: Callable[[nn.Module, nn.Module | None], Any]
    vae: Callable[[], nn.Module]
    upcasts: bool
    encoders: Callable[[], list[nn.Module]]
    call: Callable[[int, int, list[nn.Module]], Inputs]
    timesteps: Callable[[int, int], list[float]]

    def depth(self, text: str | None) -> tuple[int, int]:
        """Raises ValueError: no depth of this model."""
        if text in (None, "full"):
            return self.full
        found = re.fullmatch(r"(\d+)\+(\d+)", text or "")
        depth = (int(found[1]), int(found[2])) if found else (0, 0)
        if not all(1 <= number <= most for number, most in zip(depth, self.full, strict=True)):
            most = "+".join(map(str, self.full))
            raise ValueError(f"the depth of {self.name} is two numbers from 1+1 to {most}, or 'full'; got {text!r}")
        return depth

    def check_size(self, size: int) -> None:
        """Raises ValueError: the sides of a picture do not make whole tokens."""
        if size < self.stride or size % self.stride:
            raise ValueError(f"the size for {self.name} must be a positive multiple of {self.stride} pixels, got {size}")


@contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """A ``with`` in which modules and tensors are made on a device, floating ones in a dtype; the same at every call."""
    usual = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(usual)


# --- FLUX.1-dev --------------------------------------------------------------------------------------------------


def _flux(depth: tuple[int, int]) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    layers = {"num_layers": depth[0], "num_single_layers": depth[1]}
    return FluxTransformer2DModel(**FLUX_DEV | layers).eval().requires_grad_(False)


def _flux_inputs(size: int, images: int) -> Inputs:
    side, dtype = size // 16, torch.get_default_dtype()
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return {
        "hidden_states": alike(1, images, side * side, 64),
        "encoder_hidden_states": torch.randn(images, T5_TOKENS, 4096),
        "pooled_projections": torch.randn(images, 768),
        "timestep": torch.full((images,), 0.95),
        "guidance": torch.full((images,), 3.5),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(dtype),
        "txt_ids": torch.zeros(T5_TOKENS, 3),
    }


def _flux_pipeline(denoiser: nn.Module, vae: nn.Module | None) -> Any:
    from diffusers import FluxPipeline

    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=_flux_scheduler(), vae=vae, transformer=denoiser, **nothing)


def _flux_scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER)


def _flux_timesteps(size: int, steps: int) -> list[float]:
    """As the pipeline shifts them with the number of tokens."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    scheduler, shift = _flux_scheduler(), calculate_shift((size // 16) ** 2, *(FLUX_SCHEDULER[key] for key in keys))
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)], mu=shift)
    return scheduler.timesteps.tolist()


def _flux_encoders() -> list[nn.Module]:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    return [CLIPTextModel(CLIPTextConfig(**CLIP_L)).eval(), T5EncoderModel(T5Config(**T5_XXL)).eval()]


def _flux_call(size: int, images: int, encoders: list[nn.Module]) -> Inputs:
    side = size // 16
    text, pooled = torch.randn(1, T5_TOKENS, 4096), torch.randn(1, 768)
    if encoders:
        clip, t5 = encoders
        pooled = clip(torch.randint(1000, (1, CLIP_TOKENS))).pooler_output
        text = t5(torch.randint(1000, (1, T5_TOKENS))).last_hidden_state
    rows = {"prompt_embeds": text.repeat(images, 1, 1), "pooled_prompt_embeds": pooled.repeat(images, 1)}  # FluxPipeline does not
    return rows | {"latents": alike(1, images, side * side, 64)}


# --- SDXL-base ---------------------------------------------------------------------------------------------------


def _sdxl(depth: tuple[int, int]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**SDXL_BASE | {"transformer_layers_per_block": [1, *depth]}).eval().requires_grad_(False)


def _sdxl_inputs(size: int, images: int) -> Inputs:
    """With the unconditional half."""
    return {
        "sample": alike(2, images, 4, size // 8, size // 8),
        "timestep": torch.tensor(900),
        "encoder_hidden_states": torch.randn(2 * images, CLIP_TOKENS, 2048),
        "added_cond_kwargs": {"text_embeds": torch.randn(2 * images, 1280), "time_ids": torch.randn(2 * images, 6)},
    }


def _sdxl_pipeline(denoiser: nn.Module, vae: nn.Module | None) -> Any:
    from diffusers import StableDiffusionXLPipeline

    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return StableDiffusionXLPipeline(scheduler=_sdxl_scheduler(), vae=vae, unet=denoiser, **nothing, add_watermarker=False)


def _sdxl_scheduler() -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(**SDXL_SCHEDULER)


def _sdxl_timesteps(size: int, steps: int) -> list[float]:
    scheduler = _sdxl_scheduler()
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


def _sdxl_encoders() -> list[nn.Module]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    return [CLIPTextModel(CLIPTextConfig(**CLIP_L)).eval(), CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)).eval()]


def _sdxl_call(size: int, images: int, encoders: list[nn.Module]) -> Inputs:
    prompts = []
    for _ in ("prompt", "negative prompt"):
        text, pooled = torch.randn(1, CLIP_TOKENS, 2048), torch.randn(1, 1280)
        if encoders:
            small, large = encoders
            tokens = torch.randint(1000, (1, CLIP_TOKENS))
            first, second = small(tokens, output_hidden_states=True), large(tokens, output_hidden_states=True)
            text, pooled = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds
        prompts.append((text, pooled))
    (text, pooled), (negative, negative_pooled) = prompts
    return {
        "prompt_embeds": text,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": negative,
        "negative_pooled_prompt_embeds": negative_pooled,
        "latents": alike(1, images, 4, size // 8, size // 8),
    }


def _vae(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**config).eval().requires_grad_(False)


ARCHITECTURES = {
    "flux-dev": Architecture(
        name="flux-dev",
        component="transformer",
        full=(19, 38),
        steps=25,
        active=7,
        halves=1,
        stride=16,
        denoiser=_flux,
        inputs=_flux_inputs,
        pipeline=_flux_pipeline,
        vae=functools.partial(_vae, FLUX_VAE),
        upcasts=False,
        encoders=_flux_encoders,
        call=_flux_call,
        timesteps=_flux_timesteps,
    ),
    "sdxl-base": Architecture(
        name="sdxl-base",
        component="unet",
        full=(2, 10),
        steps=50,
        active=13,
        halves=2,
        stride=32,
        denoiser=_sdxl,
        inputs=_sdxl_inputs,
        pipeline=_sdxl_pipeline,
        vae=functools.partial(_vae, SDXL_VAE),
        upcasts=True,
        encoders=_sdxl_encoders,
        call=_sdxl_call,
        timesteps=_sdxl_timesteps,
    ),
}
