"""Guidance by operators of PyTorch: the reference, in float32 at least, and sums whose order no thread count changes."""

from __future__ import annotations

import functools

import torch
from negengine.kernels.guidance import Branches, Evidence, Guide, Nag
from torch import Tensor

from negengine.reference import guidance as reference

SUMMED = 4096  # elements to a partial sum; fewer than torch shares out among threads


def guide(call: Guide) -> None:
    conditional, negative, *rest = _wide(call.branches, _compute(call.out))
    value = reference.guide(conditional, negative, call.strength, *rest)
    call.out.view(call.copies, *value.shape).copy_(value)


def evidence(call: Evidence) -> Tensor:
    compute = _compute(call.sample, call.previous, call.branches.conditional)
    conditional, negative, *rest = _wide(call.branches, compute)
    sample, previous = (t.to(compute) for t in (call.sample, call.previous))
    return _sums(reference.squares(sample, previous, conditional, negative, call.means, *rest, call.clip))


def nag(call: Nag) -> None:
    z, away = (t.to(_compute(call.out)) for t in (call.positive, call.negative))
    value = reference.nag(z, away, call.scale, call.tau, call.alpha)
    call.out.copy_(value)
    if call.other is not None:
        call.other.copy_(value)


def _compute(*tensors: Tensor) -> torch.dtype:
    """The widest dtype of these tensors, float32 at least."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def _wide(branches: Branches, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]:
    """The arguments of ``negengine.reference.guidance.branches``."""
    u = branches.unconditional
    conditional, negative = branches.conditional.to(dtype), branches.negative.to(dtype)
    return conditional, negative, None if u is None else u.to(dtype), branches.guidance, branches.guide_negative


def _sums(terms: Tensor) -> Tensor:
    """Over the last dimension, in float64. A sum of many elements that is alone would be split by the number of threads."""
    whole = terms.shape[-1] // SUMMED * SUMMED
    parts = terms[..., :whole].unflatten(-1, (whole // SUMMED, SUMMED)).sum(-1, dtype=torch.float64)
    return parts.sum(-1) + terms[..., whole:].sum(-1, dtype=torch.float64)
