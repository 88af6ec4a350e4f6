"""Extrapolate source tokens away from their matches."""

from __future__ import annotations

import math

import torch
from negengine.kernels.call import Call
from negengine.kernels.eager.half import entries, parts, runs
from torch import Tensor

from negengine.reference import is_disjoint

NARROWEST = 64  # channels, below which a row's pieces fill no memory transaction


def whole(call: Call, cosine: Tensor, index: Tensor) -> None:
    """Gate, extrapolate into ``call.y`` and count, all tokens at once.

    ``(1 + alpha) x - alpha r`` where the cosine exceeds the threshold, ``x`` bit for bit elsewhere; rounded once from ``compute``.

    Args:
        cosine: ``[B, T]`` in the dtype of the search, ``-inf`` where nothing matches; index: int32 ``[B, T]``, ``-1`` there.
    """
    x, bank, compute = call.x, call.bank, cosine.dtype
    gate = (index >= 0) & (cosine > call.threshold.to(compute))
    if call.keep is not None:
        gate &= call.keep
    if call.stats is not None:
        eligible = (call.references >= 0).any(1).sum() * x.shape[1]
        call.stats.add_(torch.stack([gate.sum(), eligible, torch.ones_like(eligible)]))
    M, D = bank.shape[1:]
    slot, token = index.clamp_min(0).long().div(M, rounding_mode="floor"), index.clamp_min(0).long() % M
    row = call.references.long().gather(1, slot).clamp_min(0) * M + token
    r = bank.reshape(-1, D).index_select(0, row.flatten()).view_as(x).to(compute)
    # 1 + alpha in float64, as Python would: then float32 gives the bits of the published expression
    one_plus, minus = (1 + call.alpha).to(compute)[:, None, None], call.alpha.to(compute)[:, None, None]
    pushed = one_plus * x.to(compute) - minus * r
    call.y.copy_(torch.where(gate[..., None], pushed.to(x.dtype), x))


def push(call: Call, cosine: Tensor, index: Tensor) -> None:
    """Gate, extrapolate into ``call.y`` and count, in chunks of a bounded size, where a library computes in mixed dtypes.

    Args:
        cosine: ``[B, T]``; ``-inf`` or NaN where a token matches nothing. index: ``[B, T]``; there ``-1`` in int32, in int64 any
            that exists. Neither is read for images that have no reference, where the host knows which.
    """
    if index.dtype == torch.int32:
        index = index.long().clamp_min_(0)
    x, y, (B, T, D), limit = call.x, call.y, call.x.shape, entries(call.x.shape[2])
    updated = runs(call)
    gates = {images.start: cosine[images] > call.threshold for images in updated}
    for images in updated if call.keep is not None else ():
        gates[images.start] &= call.keep[images]
    if call.stats is not None:
        _count(call, gates)
    for images in runs(call, referring=False) if y is not x else ():
        y[images].copy_(x[images])

    bank, apart = call.bank, _apart(call)
    if not apart and bank is not x:
        bank, apart = bank.clone(), True  # the same memory in another order
    one_plus, minus = (x.new_empty(B, 1, 1, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    torch.add(call.alpha[:, None, None], 1, out=one_plus)  # in float64: then float32 gives the bits of the published expression
    torch.mul(call.alpha[:, None, None], -1, out=minus)
    places = {images.start: _places(call, bank, index, images) for images in updated}
    if apart:
        blocks = [[(i, t, slice(D))] for i in updated for t in parts(T, limit // ((i.stop - i.start) * D))]
    else:  # channels do not mix: a block of them is read from all images before it is written to any
        rows = sum(images.stop - images.start for images in updated) * T
        blocks = [[(i, slice(T), c) for i in updated] for c in parts(D, max(limit // max(rows, 1), NARROWEST))]
    for together in blocks:
        chosen = []
        for i, t, c in together:
            rows, place = places[i.start]
            chosen.append(rows[:, c].index_select(0, place[:, t].flatten()).view(*place[:, t].shape, -1))
        for (i, t, c), r in zip(together, chosen, strict=True):
            _extrapolate(x[i, t, c], r, one_plus[i], minus[i], gates[i.start][:, t, None], y[i, t, c])


def _extrapolate(x: Tensor, r: Tensor, one_plus: Tensor, minus: Tensor, gate: Tensor, y: Tensor) -> None:
    """``one_plus x + minus r`` where ``gate``, rounded once, ``x`` elsewhere, into ``y``; overwrites ``r``."""
    torch.addcmul(torch.mul(r, minus), x, one_plus, out=r)
    torch.where(gate, r, x, out=y)


def _count(call: Call, gates: dict[int, Tensor]) -> None:
    for gate in gates.values():
        call.stats[0].add_(gate.sum())
    T = call.x.shape[1]
    if call.entries() is None:
        named = (call.references >= 0) & (call.references < len(call.bank))
        call.stats[1].add_(named.any(1).sum() * T)
    else:
        call.stats[1].add_(sum(len(gate) for gate in gates.values()) * T)
    call.stats[2].add_(1)


def _apart(call: Call) -> bool:
    """Whether nothing is read from the bank after it may have been written to."""
    if call.y.untyped_storage()._cdata != call.bank.untyped_storage()._cdata:
        return True
    table = call.entries()
    if call.bank is not call.x or table is None:
        return False
    K = call.references.shape[1]
    return is_disjoint([table[start : start + K] for start in range(0, len(table), K)])


def _places(call: Call, bank: Tensor, index: Tensor, images: slice) -> tuple[Tensor, Tensor]:
    """Rows ``[rows, D]`` and, int64 ``[images, T]``, which of them each token of these images is pushed away from."""
    (R, M, _), K, table, index = bank.shape, call.references.shape[1], call.entries(), index[images]
    named = None if table is None or K > 1 else set(table[images])
    if named is not None and len(named) == 1:
        return bank[named.pop()], index
    references = call.references[images].long()
    if table is None:
        references.clamp_(0, R - 1)
    if K > 1:
        references, index = references.clamp_min(0).gather(1, index // M), index % M
    rows, token, image = _flat(bank)
    return rows, torch.add(index if token == 1 else index * token, references, alpha=image)


def _flat(bank: Tensor) -> tuple[Tensor, int, int]:
    """A view whose rows hold, among others, those of a bank; how many lie from one token to the next, and from image to image."""
    (R, M, D), (image, token, channel) = bank.shape, bank.stride()
    row = math.gcd(image, token) or 1
    token, image = token // row, image // row
    return bank.as_strided(((R - 1) * image + (M - 1) * token + 1, D), (row, channel)), token, image
