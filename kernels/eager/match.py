"""Search for the best reference token of every source token, in chunks."""

from __future__ import annotations

import torch
from negengine.kernels.call import Call
from negengine.kernels.eager.product import as_written
from torch import Tensor

SIMILARITY_BYTES = 64 * 2**20  # no more similarities than this exist at once
TILE = {torch.float32: 64, torch.float64: 48}  # multiples of the columns that a library's kernels take at once


def unit_rows(x: Tensor, dtype: torch.dtype, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Rows of ``x [..., D]`` over ``max(norm, eps)`` in ``dtype``, and which rows are finite ``[...]``.

    The largest entry is divided out first, so that the squares of float32 and bfloat16 values can neither overflow
    nor vanish. Rows that are not finite come back as zeros: they must not poison a product.
    """
    x = x.to(dtype)
    peak = x.abs().amax(-1, keepdim=True)
    finite = peak.isfinite()
    scale = torch.where(finite & (peak > 0), peak, 1)
    x = x / scale
    norm = x.norm(dim=-1, keepdim=True).maximum(eps / scale)
    return torch.where(finite, x / norm, 0), finite.squeeze(-1)


def whole_tiles(x: Tensor) -> Tensor:
    """``x [..., T, D]`` with zeros appended up to multiples of its dtype's ``TILE``.

    A library's product sums an entry near an edge in another order, and where the edges lie depends on the thread
    count. Over whole tiles equal rows get equal cosines, so that the lowest index can win a tie.
    """
    tokens, channels = -x.shape[-2] % TILE[x.dtype], -x.shape[-1] % TILE[x.dtype]
    return torch.nn.functional.pad(x, (0, channels, 0, tokens)) if tokens or channels else x


def match(call: Call, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Best cosine and index of every source token over its reference images, searched for in ``compute``.

    Returns:
        cosine ``[B, T]`` in ``compute`` (``-inf``: none) and index int32 ``[B, T]``, ``slot * M + token`` (``-1``: none).
    """
    x, bank, references = call.x, call.bank, call.references
    (B, T, _), (R, M, _), K = x.shape, bank.shape, references.shape[1]
    source, source_finite = unit_rows(x, compute)
    target, target_finite = (source, source_finite) if bank is x else unit_rows(bank, compute)
    source, target = whole_tiles(source), whole_tiles(target)
    allowed = target_finite if call.mask is None else target_finite & call.mask
    best = x.new_full((B, T), -torch.inf, dtype=compute)
    index = torch.full((B, T), -1, dtype=torch.int32, device=x.device)
    rows = max(1, SIMILARITY_BYTES // (compute.itemsize * target.shape[1]))
    rows = rows // TILE[compute] * TILE[compute] or rows
    table = call.entries()  # what only the device knows must not be read: it is masked there
    for b in range(B):
        for slot in range(K):
            if table is None:
                image = references[b, slot]
                present, r = (image >= 0) & (image < R), image.clamp(0, R - 1).view(1)
                tokens, finite = target.index_select(0, r)[0], target_finite.index_select(0, r)[0]
                columns = allowed.index_select(0, r)[0] & present
            elif (image := table[b * K + slot]) >= 0:
                tokens, finite, columns = target[image], target_finite[image], allowed[image]
            else:
                continue
            with as_written(x.device):
                if call.matching == "paper":
                    _search_rows(source[b], source_finite[b], tokens, columns, rows, slot * M, best[b], index[b])
                else:
                    chosen = source_finite[b] & finite
                    _search_columns(source[b], chosen, tokens, columns, rows, best[b], index[b])
    return best, index


def _similarities(source: Tensor, tokens: Tensor, finite: Tensor, columns: Tensor) -> Tensor:
    """Cosines ``[len(finite), len(columns)]`` of rows padded by :func:`whole_tiles`; ``-inf`` where not to be chosen."""
    s = (source @ tokens.T)[: len(finite), : len(columns)]
    return s.masked_fill_(~(finite[:, None] & columns), -torch.inf)


def _search_rows(
    source: Tensor, finite: Tensor, tokens: Tensor, columns: Tensor, rows: int, offset: int, best: Tensor, index: Tensor
) -> None:
    """Row maxima of ``source @ tokens.T`` over the allowed columns, folded into ``best`` and ``index`` in place."""
    for start in range(0, len(finite), rows):
        part = slice(start, start + rows)
        value, j = _similarities(source[part], tokens, finite[part], columns).max(dim=1)
        better = value > best[part]  # strict: of equal cosines the earlier slot stays
        best[part] = torch.where(better, value, best[part])
        index[part] = torch.where(better, (j + offset).int(), index[part])


def _search_columns(
    source: Tensor, chosen: Tensor, tokens: Tensor, columns: Tensor, rows: int, best: Tensor, index: Tensor
) -> None:
    """Column maxima of ``source @ tokens.T`` over the allowed rows: the matching of the published code."""
    for start in range(0, len(chosen), rows):
        part = slice(start, start + rows)
        value, i = _similarities(source[part], tokens, chosen[part], columns).max(dim=0)
        better = value > best
        best.copy_(torch.where(better, value, best))
        index.copy_(torch.where(better, (i + start).int(), index))
