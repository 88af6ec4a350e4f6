"""In the place of the release's module ``pipeline_negtome_sdxl``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline

from negengine.compat.absent import refuse
from negengine.compat.arguments import beginning_with, images_of_a_prompt, translated
from negengine.compat.call import ReleaseCall
from negengine.compat.function import negtome
from negengine.compat.number import one_number
from negengine.diffusers.families import find_denoiser
from negengine.methods import NegToMe

__all__ = ["NegtomeArgs", "StableDiffusionXLNegToMePipeline", "negtome"]


def __getattr__(name: str) -> object:
    refuse(__name__, name)


@dataclass
class NegtomeArgs:
    """The keys of ``negtome_args`` and their default values.

    Attributes:
        use_negtome: without effect, as in the release; the argument of the call decides.
        blocks: blocks merge whose name begins with one of these.
        min_attn_dim: blocks whose token grid has a side shorter than this are left alone.
    """

    use_negtome: bool = False
    merging_alpha: float = 0.9
    merging_threshold: float = 0.7
    merging_dropout: float = 0.0
    merging_t_start: int = 1000
    merging_t_end: int = 800
    blocks: list[str] | None = field(default_factory=lambda: ["up_blocks"])
    min_attn_dim: int = 32
    use_rag_assets: bool = False
    noise_rag: bool = False
    rag_assets: Any | None = None


class StableDiffusionXLNegToMePipeline(ReleaseCall, StableDiffusionXLPipeline):
    """``StableDiffusionXLPipeline`` whose call takes ``use_negtome``, ``negtome_args`` (keys: :class:`NegtomeArgs`) and ``seed``:
    without a generator it draws from one of that seed, 0 by default, so that a call repeated gives the same pictures."""

    _defaults: ClassVar[Any] = NegtomeArgs()
    _positional: ClassVar[tuple[str, ...]] = (
        "prompt", "prompt_2", "height", "width", "num_inference_steps", "timesteps", "sigmas", "denoising_end", "guidance_scale",
        "negative_prompt", "negative_prompt_2", "num_images_per_prompt", "eta", "generator", "latents", "prompt_embeds",
        "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "ip_adapter_image",
        "ip_adapter_image_embeds", "output_type", "return_dict", "cross_attention_kwargs", "guidance_rescale", "original_size",
        "crops_coords_top_left", "target_size", "negative_original_size", "negative_crops_coords_top_left", "negative_target_size",
        "clip_skip", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "seed", "use_negtome", "negtome_args",
    )  # fmt: skip
    _latents_a_side: ClassVar[int] = 1

    def _translate(self, arguments: Mapping[str, Any], call: Mapping[str, Any]) -> NegToMe | str:
        unet, family = find_denoiser(self)
        return translated(
            arguments,
            self._reference(arguments, call),
            images_of_a_prompt(call),
            beginning_with(arguments["blocks"], [site.name for site in family.tokens.sites(unet)]),
            self.scheduler.config.num_train_timesteps,
            min_grid=max(1, math.ceil(one_number("min_attn_dim", arguments["min_attn_dim"], finite=True))),
        )

    def _for_diffusers(self, call: Mapping[str, Any]) -> dict[str, Any]:
        call = dict(call)
        seed = call.pop("seed", 0)
        if call.get("generator") is None:
            # with sequential offload the weights' own device holds nothing
            device = self._execution_device if self.unet.device.type == "meta" else self.unet.device
            call["generator"] = torch.Generator(device).manual_seed(seed)
        return call

    def customize_transformer_forward(self) -> None:
        """For scripts that call it: there is no forward to customise, since the engine reads sizes from the denoiser's inputs."""
