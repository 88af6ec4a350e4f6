"""Search for the best reference token of every source token, in chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
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


@contextlib.contextmanager
def as_written(device: torch.device) -> Iterator[None]:
    """Products in the dtype of their operands: no autocast, no TF32, no bfloat16 in place of float32."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


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
    (B, T, _), M = x.shape, bank.shape[1]
    source, source_finite = unit_rows(x, compute)
    target, target_finite = (source, source_finite) if bank is x else unit_rows(bank, compute)
    source, target = whole_tiles(source), whole_tiles(target)
    allowed = target_finite if mask is None else target_finite & mask
    best = x.new_full((B, T), -torch.inf, dtype=compute)
    index = torch.full((B, T), -1, dtype=torch.int32, device=x.device)
    rows = max(1, SIMILARITY_BYTES // (compute.itemsize * target.shape[1]))
    rows = rows // TILE[compute] * TILE[compute] or rows
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
            with as_written(x.device):
                if matching == "paper":
                    _search_rows(source[b], source_finite[b], tokens, columns, rows, slot * M, best[b], index[b])
                else:
                    chosen = source_finite[b] & target_finite.index_select(0, r)[0]
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
