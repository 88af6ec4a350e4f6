"""Search for the best reference token of every source token, in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

SIMILARITY_BYTES = 64 * 2**20  # no more similarities than this exist at once


def unit_rows(x: Tensor, dtype: torch.dtype, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Rows of ``x [..., D]`` over ``max(norm, eps)`` in ``dtype``, and which rows are finite ``[...]``.

    The largest entry is divided out first, so that the squares of float32 and bfloat16 values can neither overflow
    nor vanish. Rows that are not finite come back as zeros: they must not poison a product.
    """
    x = x.to(dtype)
    peak = x.abs().amax(-1, keepdim=True)
    finite = peak.isfinite()
    scale = torch.where(finite & (peak > 0), peak, 1)
    norm = (x / scale).norm(dim=-1, keepdim=True) * scale
    return torch.where(finite, x / norm.clamp_min(eps), 0), finite.squeeze(-1)


def match(
    x: Tensor, bank: Tensor, references: Tensor, mask: Tensor | None, matching: str, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Best cosine and index of every source token over its reference images.

    Args:
        x: ``[B, T, D]``; bank: ``[R, M, D]``; references: int32 ``[B, K]``, ``-1`` pads; mask: bool ``[R, M]`` or None.
        matching: ``"paper"`` or ``"release"`` (the latter with ``K == 1`` and ``M == T``).
        compute: dtype of the search.

    Returns:
        cosine ``[B, T]`` in ``compute`` (``-inf``: none) and index int32 ``[B, T]``, ``slot * M + token`` (``-1``: none).
    """
    (B, T, _), (R, M, _) = x.shape, bank.shape
    source, source_finite = unit_rows(x, compute)
    target, target_finite = (source, source_finite) if bank is x else unit_rows(bank, compute)
    allowed = target_finite if mask is None else target_finite & mask
    best = x.new_full((B, T), -torch.inf, dtype=compute)
    index = torch.full((B, T), -1, dtype=torch.int32, device=x.device)
    rows = max(1, SIMILARITY_BYTES // (compute.itemsize * M))
    on_host = references.device.type == "cpu"  # elsewhere reading an entry would wait for the device
    for b in range(B):
        for slot in range(references.shape[1]):
            image = references[b, slot]
            if on_host and image < 0:
                continue
            present = image >= 0
            r = image.clamp_min(0).long().view(1)
            tokens = target[int(image)] if on_host else target.index_select(0, r)[0]
            columns = allowed.index_select(0, r)[0] & present
            if matching == "paper":
                _search_rows(source[b], source_finite[b], tokens, columns, rows, slot * M, best[b], index[b])
            else:
                chosen = source_finite[b] & target_finite.index_select(0, r)[0]
                _search_columns(source[b], chosen, tokens, columns, rows, best[b], index[b])
    return best, index


def _search_rows(
    source: Tensor, finite: Tensor, tokens: Tensor, columns: Tensor, rows: int, offset: int, best: Tensor, index: Tensor
) -> None:
    """Row maxima of ``source @ tokens.T`` over the allowed columns, folded into ``best`` and ``index`` in place."""
    for start in range(0, len(source), rows):
        part = slice(start, start + rows)
        s = source[part] @ tokens.T
        s.masked_fill_(~(finite[part, None] & columns), -torch.inf)
        value, j = s.max(dim=1)
        better = value > best[part]  # strict: of equal cosines the earlier slot stays
        best[part] = torch.where(better, value, best[part])
        index[part] = torch.where(better, (j + offset).int(), index[part])


def _search_columns(
    source: Tensor, chosen: Tensor, tokens: Tensor, columns: Tensor, rows: int, best: Tensor, index: Tensor
) -> None:
    """Column maxima of ``source @ tokens.T`` over the allowed rows: the matching of the published code."""
    for start in range(0, len(source), rows):
        part = slice(start, start + rows)
        s = source[part] @ tokens.T
        s.masked_fill_(~(chosen[part, None] & columns), -torch.inf)
        value, i = s.max(dim=0)
        better = value > best
        best.copy_(torch.where(better, value, best))
        index.copy_(torch.where(better, (i + start).int(), index))
