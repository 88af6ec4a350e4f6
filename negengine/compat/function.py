"""The release's function ``negtome``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from negengine import ops, reference
from negengine.compat.number import number, probability


def negtome(
    hidden_states_orig: Tensor,
    alpha: float | Tensor = 0.5,
    threshold: float | Tensor = 0.7,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Push the tokens of every image of a batch away from those of its first image, as the release does.

    With numbers, and no mask or one of shape ``[T]``, the engine's fused operator does it, and image 0 comes back unchanged. All
    else that the release takes is computed with the whole similarity matrix, as there.

    Args:
        hidden_states_orig: ``[N, T, D]``; image 0 is the reference.
        alpha: see :class:`negengine.NegToMe`; a number, or a tensor that multiplies ``[N, T, D]``.
        threshold: a token is merged where its best cosine exceeds this; a number, or a tensor that compares with ``[N, T]``.
        dropout: probability of leaving a token out, drawn from torch's global generator as in the release.
        mask: which pairs may match: ``[T, T]``, ``[N * T, T]`` or ``[N, T, T]``, nonzero where source token ``i`` (of image ``n``)
            may match reference token ``p``. ``[T]``, which the release does not take, says the same for all of them.

    Returns:
        A new tensor ``[N, T, D]``. It can be differentiated, by way of the whole matrix.

    Raises:
        TypeError, ValueError: a mask of another shape, or a setting that cannot work.
    """
    x = hidden_states_orig
    if x.ndim != 3:
        raise ValueError(f"hidden_states_orig must have shape [N, T, D], got {list(x.shape)}")
    N, T, _ = x.shape
    alpha, threshold = number("alpha", alpha, finite=True), number("threshold", threshold)
    dropout = probability("dropout", dropout)
    columns = mask is not None and list(mask.shape) == [T]
    if mask is not None and not columns and mask.numel() not in (T * T, N * T * T):
        raise ValueError(f"mask must have shape [{T}], [{T}, {T}], [{N * T}, {T}] or [{N}, {T}, {T}], got {list(mask.shape)}")
    may_match = None if mask is None else mask != 0
    keep = reference.draw_keep(N, T, dropout, device=x.device) if dropout > 0 else None
    if (torch.is_grad_enabled() and x.requires_grad) or isinstance(alpha, Tensor) or isinstance(threshold, Tensor):
        return _whole_matrix(x, alpha, threshold, keep, may_match)
    if mask is not None and not columns:
        return _whole_matrix(x, alpha, threshold, keep, may_match)
    references = reference.group_references("first", N, N).to(x.device)
    y = x.clone(memory_format=torch.contiguous_format)
    limit = torch.full((1,), threshold, dtype=torch.float64, device=x.device)  # as a tensor it may lie beyond every cosine
    bank_mask = None if may_match is None else may_match.expand(N, T)
    return ops.negtome_(y, references, alpha, limit, x, bank_mask, keep, matching="release")


def _whole_matrix(x: Tensor, alpha: Any, threshold: Any, keep: Tensor | None, may_match: Tensor | None) -> Tensor:
    """The release's rule as it stands."""
    T = x.shape[1]
    similarity = reference.cosine(x, x[0])
    if may_match is not None:
        similarity = similarity.masked_fill(~may_match.reshape(-1, T if may_match.ndim > 1 else 1, T), -math.inf)
    best, source = similarity.max(dim=1)
    merged = best > threshold
    if keep is not None:
        merged = merged & keep
    return torch.where(merged[..., None], (1 + alpha) * x - alpha * x[0][source], x)
