"""In the place of the release's module ``pipeline_negtome_flux``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import FluxPipeline

from negengine.compat.absent import refuse
from negengine.compat.arguments import images_of_a_prompt, translated
from negengine.compat.call import ReleaseCall
from negengine.compat.function import negtome
from negengine.compat.number import one_number
from negengine.methods import NegToMe

__all__ = ["FluxNegToMePipeline", "NegtomeArgs", "negtome"]


def __getattr__(name: str) -> object:
    refuse(__name__, name)


@dataclass
class NegtomeArgs:
    """The keys of ``negtome_args`` and their default values.

    Attributes:
        use_negtome: without effect, as in the release; the argument of the call decides.
        num_joint_blocks, num_single_blocks: how many blocks merge, from the first; all if negative.
        num_lang_tokens: without effect; the number of text tokens is read from the call.
    """

    use_negtome: bool = False
    merging_alpha: float = 0.9
    merging_threshold: float = 0.65
    merging_dropout: float = 0.0
    merging_t_start: int = 1000
    merging_t_end: int = 900
    num_joint_blocks: int = -1
    num_single_blocks: int = -1
    num_lang_tokens: int = 512
    use_rag_assets: bool = False
    noise_rag: bool = False
    rag_assets: Any | None = None


class FluxNegToMePipeline(ReleaseCall, FluxPipeline):
    """``FluxPipeline`` whose call takes ``use_negtome`` and ``negtome_args`` (keys: :class:`NegtomeArgs`), in the release's order
    of arguments and with its default ``guidance_scale`` of 7."""

    _defaults: ClassVar[Any] = NegtomeArgs()
    _positional: ClassVar[tuple[str, ...]] = (
        "prompt", "prompt_2", "height", "width", "num_inference_steps", "timesteps", "guidance_scale", "num_images_per_prompt",
        "generator", "latents", "prompt_embeds", "pooled_prompt_embeds", "output_type", "return_dict", "joint_attention_kwargs",
        "callback_on_step_end", "callback_on_step_end_tensor_inputs", "max_sequence_length", "use_negtome", "negtome_args",
    )  # fmt: skip
    _latents_a_side: ClassVar[int] = 2

    def _translate(self, arguments: Mapping[str, Any], call: Mapping[str, Any]) -> NegToMe | str:
        blocks: list[str] = []
        for part, key in (("transformer_blocks", "num_joint_blocks"), ("single_transformer_blocks", "num_single_blocks")):
            there, count = len(getattr(self.transformer, part)), one_number(key, arguments[key])
            blocks += [f"{part}.{i}" for i in range(there if count < 0 else math.ceil(min(count, there)))]
        embeds = call.get("prompt_embeds")
        latents_like = embeds if embeds is not None else self.text_encoder_2 or self.transformer
        return translated(
            arguments,
            self._reference(arguments, call),
            images_of_a_prompt(call),
            blocks,
            self.scheduler.config.num_train_timesteps,
            rounded_to=latents_like.dtype,
        )

    def _for_diffusers(self, call: Mapping[str, Any]) -> dict[str, Any]:
        call = {"guidance_scale": 7.0, **call}
        if call.pop("timesteps", None) is not None:
            raise ValueError("FLUX takes no timesteps, neither here nor in the release; give sigmas")
        return call

    def reset_attn_processor(self) -> None:
        """Take off what the last call applied; the next one decides anew."""
        self._put(None)
