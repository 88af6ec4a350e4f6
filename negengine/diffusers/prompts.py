"""Prompts of a method's own, encoded as the pipeline encodes the prompts of its call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from negengine.diffusers.families import Family
from negengine.methods.prompts import Embeddings, Prompt

Encode = Callable[[Prompt], dict[str, Tensor]]


def encoder(
    pipe: Any,
    family: Family,
    arguments: Mapping[str, Any],
    embeds: Tensor,
    images: int,
    unheard: Callable[[], AbstractContextManager[None]],
) -> Encode:
    """How to encode further prompts in a call whose own were encoded with ``arguments`` to ``embeds`` ``[rows, L, D]``."""
    length = embeds.shape[1]
    prompts = images // (arguments.get("num_images_per_prompt") or 1)

    def ask(**given: Any) -> dict[str, Tensor]:
        changed: dict[str, Any] = {name: None for name in arguments if "prompt" in name and name != "num_images_per_prompt"}
        if "do_classifier_free_guidance" in arguments:
            changed["do_classifier_free_guidance"] = False
        if "max_sequence_length" in arguments:
            changed["max_sequence_length"] = length
        with unheard(), torch.no_grad():
            return family.conditioning.prompts(pipe.encode_prompt(**{**arguments, **changed, **given}))

    def encode(prompt: Prompt) -> dict[str, Tensor]:
        if not isinstance(prompt, Embeddings) and not _has_text_encoder(pipe):
            raise ValueError("this pipeline has no text encoder to encode a prompt with; give negengine.Embeddings(prompt, pooled)")
        if isinstance(prompt, Embeddings):
            inputs = ask(**_given(prompt, arguments, embeds))
        else:
            texts = [prompt] * prompts if isinstance(prompt, str) else list(prompt)
            if len(texts) != prompts:
                raise ValueError(f"{len(texts)} prompts to avoid, but this call has {prompts}; give one, or one for each")
            inputs = ask(prompt=texts)
        inputs = {name: a_row_per_image(name, value, images) for name, value in inputs.items()}
        text = inputs["encoder_hidden_states"]
        if text.shape[-1] != embeds.shape[-1]:
            raise ValueError(f"the embeddings to avoid have {text.shape[-1]} channels, those of this call {embeds.shape[-1]}")
        if text.shape[1] < length:
            empty = ask(prompt=[""] * prompts)["encoder_hidden_states"]
            filling = torch.cat([text, *[empty] * -(-(length - text.shape[1]) // empty.shape[1])], 1)
            inputs["encoder_hidden_states"] = filling[:, :length]
        elif text.shape[1] > length:
            raise ValueError(
                f"the prompt to avoid has {text.shape[1]} text tokens, but those of this call have {length}; shorten it, "
                "or lengthen the others"
            )
        return inputs

    return encode


def _has_text_encoder(pipe: Any) -> bool:
    names = [name for name in getattr(pipe, "components", {}) if name.startswith("text_encoder")]
    return not names or any(getattr(pipe, name, None) is not None for name in names)


def _given(prompt: Embeddings, arguments: Mapping[str, Any], embeds: Tensor) -> dict[str, Tensor]:
    given = {"prompt_embeds": prompt.prompt.to(embeds)}
    if "pooled_prompt_embeds" in arguments:
        if prompt.pooled is None:
            raise ValueError("this pipeline's denoiser takes pooled text too; give Embeddings(prompt, pooled)")
        given["pooled_prompt_embeds"] = prompt.pooled.to(embeds)
    return given


def a_row_per_image(name: str, value: Tensor, images: int) -> Tensor:
    """Each prompt's row, once for each of its images. Raises ValueError where the rows do not divide the images."""
    if len(value) == images:
        return value
    if images % len(value):
        raise ValueError(f"the embeddings to avoid have {len(value)} rows, which do not divide this call's {images} images")
    return value.repeat_interleave(images // len(value), 0)
