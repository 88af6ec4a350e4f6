"""Prompts of a method's own, encoded as the pipeline encodes the prompts of its call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from negengine.diffusers.described import as_inputs
from negengine.diffusers.families import Family
from negengine.diffusers.rows import TEXT
from negengine.methods.prompts import Embeddings, Prompt

Encode = Callable[[Prompt], dict[str, Tensor]]
Read = Callable[[Sequence[Any]], dict[str, Tensor]]


def encoder(
    owner: Callable[[], Any],
    family: Family,
    arguments: Mapping[str, Any],
    embeds: Sequence[Tensor],
    images: int,
    prompts: int,
    unheard: Callable[[], AbstractContextManager[None]],
) -> Encode:
    """How the pipeline ``owner()`` encodes further prompts in a call that encoded its own ones with ``arguments`` to ``embeds``.

    Args:
        embeds: rows ``[L, D]``. images, prompts: of the call.
    """
    like, mask = embeds[0], family.conditioning.mask
    length, channels = like.shape

    def ask(given: Mapping[str, Any], read: Read = family.conditioning.prompts) -> dict[str, Tensor]:
        changed: dict[str, Any] = {name: None for name in arguments if "prompt" in name and name != "system_prompt"}
        if "num_images_per_prompt" in arguments:
            changed["num_images_per_prompt"] = 1  # repeated here: Qwen-Image's pipeline gives images the masks of other prompts
        if "do_classifier_free_guidance" in arguments:
            changed["do_classifier_free_guidance"] = False
        pipe, longest = owner(), family.conditioning.longest
        if longest is not None and "max_sequence_length" in arguments:
            changed["max_sequence_length"] = longest(pipe, length)
        with unheard(), torch.no_grad():
            return as_inputs(family, read, pipe.encode_prompt(**{**arguments, **changed, **given}), TEXT)

    def ask_to_avoid(texts: list[str]) -> dict[str, Tensor]:
        if family.conditioning.negatives is None:
            return ask({"prompt": texts})
        both = {"prompt": [""] * len(texts), "negative_prompt": texts, "do_classifier_free_guidance": True}
        return ask(both, family.conditioning.negatives)

    def encode(prompt: Prompt) -> dict[str, Tensor]:
        if not isinstance(prompt, Embeddings) and not _has_text_encoder(owner()):
            raise ValueError("this pipeline has no text encoder to encode a prompt with; give negengine.Embeddings(prompt, pooled)")
        if isinstance(prompt, Embeddings):
            inputs = ask(_given(prompt, arguments, like))
        else:
            texts = [prompt] * prompts if isinstance(prompt, str) else list(prompt)
            if len(texts) != prompts:
                raise ValueError(f"{len(texts)} prompts to avoid, but this call has {prompts}; give one, or one for each")
            inputs = ask_to_avoid(texts)
        text = inputs[TEXT]
        if text.shape[-1] != channels:
            raise ValueError(f"the embeddings to avoid have {text.shape[-1]} channels, those of this call {channels}")
        if family.conditioning.longest is not None and text.shape[1] < length:
            empty = ask_to_avoid([""] * len(text))[TEXT]
            filling = torch.cat([text, *[empty] * -(-(length - text.shape[1]) // empty.shape[1])], 1)
            if mask in inputs:
                inputs[mask] = torch.nn.functional.pad(inputs[mask], (0, length - text.shape[1]), value=1)
            inputs[TEXT] = filling[:, :length]
        elif family.conditioning.longest is not None and text.shape[1] > length:
            raise ValueError(
                f"the prompt to avoid has {text.shape[1]} text tokens, but those of this call have {length}; shorten it, "
                "or lengthen the others"
            )
        return {name: a_row_per_image(value, images) for name, value in inputs.items()}

    return encode


def _has_text_encoder(pipe: Any) -> bool:
    names = [name for name in getattr(pipe, "components", {}) if name.startswith("text_encoder")]
    return not names or any(getattr(pipe, name, None) is not None for name in names)


def _given(prompt: Embeddings, arguments: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
    given = {"prompt_embeds": prompt.prompt.to(like)}
    if "pooled_prompt_embeds" in arguments:
        if prompt.pooled is None:
            raise ValueError("this pipeline's denoiser takes pooled text too; give Embeddings(prompt, pooled)")
        given["pooled_prompt_embeds"] = prompt.pooled.to(like)
    if "prompt_attention_mask" in arguments:
        given["prompt_attention_mask"] = torch.ones(prompt.prompt.shape[:2], dtype=torch.int64, device=like.device)
    return given


def a_row_per_image(value: Tensor, images: int) -> Tensor:
    """Each prompt's row, once for each of its images. Raises ValueError where the rows do not divide the images."""
    if len(value) == images:
        return value
    if images % len(value):
        raise ValueError(f"the embeddings to avoid have {len(value)} rows, which do not divide this call's {images} images")
    return value.repeat_interleave(images // len(value), 0)
