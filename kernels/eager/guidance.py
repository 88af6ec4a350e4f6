"""Guidance by operators of PyTorch: the reference, in float32 at least, and sums whose order no thread count changes."""

from __future__ import annotations

import torch
from negengine.kernels.guidance import Branches, Evidence, Guide, Nag
from torch import Tensor

from negengine.reference import guidance as reference

SUMMED = 4096  # elements to a partial sum; fewer than torch shares out among threads


def guide(call: Guide) -> None:
    conditional, negative, *rest = _wide(call.branches)
    value = reference.guide(conditional, negative, call.strength, *rest)
    call.out.view(call.copies, *value.shape).copy_(value)


def evidence(call: Evidence) -> Tensor:
    conditional, negative, *rest = _wide(call.branches)
    sample, previous = (_widened(t) for t in (call.sample, call.previous))
    return _sums(reference.squares(sample, previous, conditional, negative, call.means, *rest, call.clip))


def nag(call: Nag) -> None:
    value = reference.nag(_widened(call.positive), _widened(call.negative), call.scale, call.tau, call.alpha)
    call.out.copy_(value)
    if call.other is not None:
        call.other.copy_(value)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _wide(branches: Branches) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]:
    """The arguments of ``negengine.reference.guidance.branches``."""
    conditional, negative, unconditional = (None if t is None else _widened(t) for t in branches[:3])
    assert conditional is not None
    assert negative is not None
    return conditional, negative, unconditional, branches.guidance, branches.guide_negative


def _sums(terms: Tensor) -> Tensor:
    """Over the last dimension, in float64. A sum of many elements that is alone would be split by the number of threads."""
    whole = terms.shape[-1] // SUMMED * SUMMED
    parts = terms[..., :whole].unflatten(-1, (whole // SUMMED, SUMMED)).sum(-1, dtype=torch.float64)
    return parts.sum(-1) + terms[..., whole:].sum(-1, dtype=torch.float64)
