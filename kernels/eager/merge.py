"""Extrapolate source tokens away from their matches."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(
    x: Tensor,
    bank: Tensor,
    references: Tensor,
    index: Tensor,
    gate: Tensor,
    alpha: Tensor,
    compute: torch.dtype,
) -> Tensor:
    """``(1 + alpha) x - alpha r`` where ``gate`` is true, ``x`` bit for bit elsewhere; rounded once from ``compute``.

    Args:
        x: ``[B, T, D]``; bank: ``[R, M, D]``; references: int32 ``[B, K]``; index: int32 ``[B, T]`` as ``match`` gives it.
        gate: bool ``[B, T]``; alpha: float64 ``[B]``.
    """
    M, D = bank.shape[1:]
    slot, token = index.clamp_min(0).long().div(M, rounding_mode="floor"), index.clamp_min(0).long() % M
    row = references.long().gather(1, slot).clamp_min(0) * M + token
    r = bank.reshape(-1, D).index_select(0, row.flatten()).view_as(x).to(compute)
    # 1 + alpha in float64, as Python would: then float32 gives the bits of the published expression
    one_plus, minus = (1 + alpha).to(compute)[:, None, None], alpha.to(compute)[:, None, None]
    pushed = one_plus * x.to(compute) - minus * r
    return torch.where(gate[..., None], pushed.to(x.dtype), x)
