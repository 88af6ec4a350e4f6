"""Search in 16 bits: products with float32 results over chunks of one bounded buffer, on the host without a wait.

A cosine is ``<x_i, k_j> / (|x_i| |k_j|)``. The norm of a source changes no order and is divided out of its maximum alone; that of a
key is a weight of its column, multiplied in float32. So the factors of the product are 16-bit numbers as they are, up to a power
of two per key, the maximum is a float32 cosine, and nothing has to be scored again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from negengine.kernels.call import Call
from negengine.kernels.eager.product import Product
from torch import Tensor

EPS = 1e-12
# Norms of bfloat16 rows, up to 2**134, are kept in units of 2**70: from EPS on they are then normal numbers of float32.
UNIT = {torch.float16: 1.0, torch.bfloat16: 2.0**70}
# Keys of bfloat16 are scaled to norms of about 2**-10: the product with the largest source stays below the largest number of
# float32, and that with a source of norm EPS far above the smallest. A tensor without dimensions: a number over a tensor would
# be two launches.
KEY = 2.0**-10
KEY_IN_UNITS = torch.tensor(KEY / UNIT[torch.bfloat16])
LARGEST = 2.0**63  # of norms in units
EXPONENT = 0x7F800000  # bits of a float32


def entries(channels: int) -> int:
    """How many float32 numbers exist at once: 25 MiB of them at 3,072 channels, twice as many where there are half as many.

    With the keys' copy that is under 40 MB of workspace at 3,072 channels. The product of a chunk is shorter the fewer channels
    there are; larger chunks keep the launches beside it few.
    """
    return min(50 * 2**20, 25 * 2**20 * 3072 // channels) // 4


def parts(length: int, most: int) -> Iterator[slice]:
    """Slices of nearly equal lengths, none longer than ``most``; a ``most`` below one counts as one."""
    size = math.ceil(length / math.ceil(length / max(most, 1)))
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def runs(call: Call, referring: bool = True) -> list[slice]:
    """Neighbouring images that have references, or those that have none; where only the device knows, all have."""
    B, K = call.references.shape
    table = call.entries()
    some = [table is None or max(table[b * K : b * K + K]) >= 0 for b in range(B)]
    return [images for images, there in neighbours(some) if there == referring]


def neighbours(values: list) -> Iterator[tuple[slice, Any]]:
    """Slices of equal neighbours, and what they equal."""
    start = 0
    for value, group in groupby(values):
        stop = start + len(list(group))
        yield slice(start, stop), value
        start = stop


def searches(call: Call) -> Iterator[tuple[slice, int, int | Tensor, bool]]:
    """``(images, slot, reference image, first)`` by slots: which images are searched together, and whether for the first time.

    Where only the device knows the table the reference is a tensor, which may say that there is none.
    """
    (B, K), table, release = call.references.shape, call.entries(), call.matching == "release"
    for slot in range(K):
        if table is None:
            yield from ((slice(b, b + 1), slot, call.references[b, slot], slot == 0) for b in range(B))
            continue
        rows = [table[b * K : b * K + slot + 1] for b in range(B)]
        alike = [(row[-1], max(row[:-1], default=-1) < 0, b if release else 0) for b, row in enumerate(rows)]
        yield from ((images, slot, r, first) for images, (r, first, _) in neighbours(alike) if r >= 0)


def row_norms(x: Tensor) -> Tensor:
    """Float32 ``[B, T]``: ``max(norm, EPS)`` of every row in units of ``UNIT``; infinite or NaN where the row is not finite.

    One reduction squares in float32 (a float64 one would first copy the rows at four times their size). That overflows for rows of
    bfloat16 above 2**64: their norms are those of a scaled copy, a chunk at a time.
    """
    unit, (B, T, D) = UNIT[x.dtype], x.shape
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    if unit != 1:
        large = torch.empty_like(norm)
        for part in parts(T, 2 * entries(D) // (B * D)):  # two 16-bit numbers in the place of one
            torch.linalg.vector_norm(x[:, part] * (1 / unit), dim=-1, dtype=torch.float32, out=large[:, part])
        norm *= 1 / unit
        norm = torch.where(norm < 2.0**60 / unit, norm, large)
    return norm.clamp_(min=EPS / unit)


def image(tensor: Tensor, number: int | Tensor) -> Tensor:
    """One image of ``[R, ...]``: a view where the host knows which, else a copy."""
    return tensor[number] if isinstance(number, int) else tensor.index_select(0, number.view(1))[0]


def search(call: Call, product: Product, best: Tensor, index: Tensor) -> None:
    """Cosine into ``best`` (float32) and index into ``index`` (int64), both ``[B, T]``, of images that have references.

    A token that nothing can be matched to gets ``-inf`` or NaN, and any index that exists.
    """
    x, bank, release = call.x, call.bank, call.matching == "release"
    R, M = bank.shape[:2]
    norms = row_norms(x)
    bank_norms = norms if bank is x else row_norms(bank)
    for images, slot, r, first in searches(call):
        present = None
        if isinstance(r, Tensor):
            present, r = (r >= 0) & (r < R), r.clamp(0, R - 1)
        target, mask = image(bank_norms, r), None if call.mask is None else image(call.mask, r)
        allowed = target < torch.inf  # nor NaN
        if present is not None:
            allowed &= present
        into = best[images], index[images], slot * M, first
        if release:
            # each reference token looks for its best source token, whose number then says which reference token to push from
            b = images.start
            allowed &= norms[b] < torch.inf
            _maxima(image(bank, r)[None], lambda part, b=b: x[b, part], norms[b], allowed, product, *into)
            best[b].div_(target)
            if mask is not None:
                best[b].masked_fill_(~mask, -torch.inf)
        else:
            if mask is not None:
                allowed &= mask
            _maxima(x[images], lambda part, r=r: image(bank[:, part], r), target, allowed, product, *into)
    if not release:
        for images in runs(call):
            best[images].div_(norms[images])


def match(call: Call, product: Product) -> tuple[Tensor, Tensor]:
    """Cosine ``[B, T]`` float32 (``-inf``: none) and index int32 ``[B, T]`` (``-1``: none)."""
    best = call.x.new_full(call.x.shape[:2], -torch.inf, dtype=torch.float32)
    index = torch.zeros_like(best, dtype=torch.int64)
    search(call, product, best, index)
    found = best > -torch.inf
    return torch.where(found, best, -torch.inf), torch.where(found, index, -1).int()


def _maxima(
    queries: Tensor,
    keys: Callable[[slice], Tensor],
    norms: Tensor,
    allowed: Tensor,
    product: Product,
    best: Tensor,
    index: Tensor,
    offset: int,
    first: bool,
) -> None:
    """For queries ``[G, T, D]`` the best of ``M`` keys, by cosines times the query's norm; into ``best, index [G, T]``.

    Unless this is their ``first`` search, only what is better than they hold replaces it.
    """
    (G, T, D), M, limit = queries.shape, len(norms), entries(queries.shape[2])
    if queries.dtype == torch.bfloat16:
        finite = norms.nan_to_num(LARGEST, LARGEST, LARGEST)
        power = (finite.view(torch.int32) & EXPONENT).view(torch.float32)  # of two, at most the norm
        factor, weight, unscaled = torch.div(KEY_IN_UNITS, power), power / finite, 1 / (KEY * UNIT[queries.dtype])
    else:
        factor, weight, unscaled = None, norms.nan_to_num(1.0, 1.0, 1.0).reciprocal_(), 1.0
    bias = torch.log(allowed)  # 0 or -inf
    for part in parts(M, limit // D):
        size = part.stop - part.start
        key = keys(part).nan_to_num(0.0, 0.0, 0.0)  # the column of one NaN would be NaN
        if factor is not None:
            key *= factor[part, None]
        value, place = (best, index) if first else (torch.empty_like(best), torch.empty_like(index))
        rows = list(parts(T, limit // (G * size)))
        buffer = norms.new_empty(G * (rows[0].stop - rows[0].start) * size)
        for row in rows:
            cosine = buffer[: G * (row.stop - row.start) * size].view(G, -1, size)
            product(queries[:, row], key.T.expand(G, D, size), cosine)
            torch.addcmul(bias[part], cosine, weight[part], value=unscaled, out=cosine)
            torch.max(cosine, dim=2, out=(value[:, row], place[:, row]))
        del key, buffer, cosine  # before the next part's are made
        if offset + part.start:
            place += offset + part.start
        if not first:
            better = value > best
            torch.where(better, value, best, out=best)
            torch.where(better, place, index, out=index)
        first = False
