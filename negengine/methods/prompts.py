"""Prompts of a method's own: text, or embeddings that were computed elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Embeddings:
    """A prompt that is already encoded, for pipelines whose text encoders are not loaded. Compared by identity.

    Args:
        prompt: embeddings of the tokens ``[P, L, D]``, one row per prompt of the call (or one row for all), L tokens each, in
            a floating dtype and as the pipeline's own ``prompt_embeds``.
        pooled: pooled embeddings ``[P, D']`` for families that take them (SDXL, FLUX); None for those that do not.

    Raises:
        TypeError: no tensors, or not of a floating dtype.
        ValueError: another shape, no elements, NaN or Inf, or another number of rows in ``pooled``.
    """

    prompt: Tensor
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        _tensor("prompt", self.prompt, "[P, L, D]")
        if self.pooled is None:
            return
        _tensor("pooled", self.pooled, "[P, D]")
        if len(self.pooled) != len(self.prompt):
            raise ValueError(f"the embeddings have {len(self.prompt)} prompts, the pooled ones {len(self.pooled)}; make them equal")


Prompt = str | tuple[str, ...] | Embeddings


def check_prompt(name: str, value: object) -> Prompt:
    """A text for all prompts of the call, texts (one per prompt of the call) as a tuple, or :class:`Embeddings`.

    Raises:
        TypeError, ValueError: anything else, and an empty sequence.
    """
    if isinstance(value, str | Embeddings):
        return value
    if isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor {list(value.shape)}; wrap embeddings: Embeddings(prompt, pooled)")
    if not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"{name} must be a text, a sequence of texts (one per prompt of the call) or Embeddings, got {value!r}")
    if not value:
        raise ValueError(f"{name} is an empty sequence; give one text per prompt of the call, or one text for all")
    return tuple(value)


def _tensor(name: str, value: object, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} embeddings must be a tensor {shape}, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} embeddings must be of a floating dtype, got {value.dtype}")
    if value.ndim != shape.count(",") + 1 or not value.numel():
        raise ValueError(f"{name} embeddings must have the shape {shape} and some elements, got {list(value.shape)}")
    if not value.is_meta and not value.isfinite().all():
        raise ValueError(f"{name} embeddings contain NaN or Inf")
