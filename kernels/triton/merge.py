"""After the search: the best candidate, its cosine in float32, the gate, and the extrapolation."""

from __future__ import annotations

import triton
import triton.language as tl
from negengine.kernels.triton.exact import any_careful, corrected, cosine_of, key_row, products
from negengine.kernels.triton.match import NONE
from negengine.kernels.triton.rescore import CANDIDATES, rescored
from negengine.kernels.triton.rows import LARGEST, is_finite, narrowed, rounded_product, rows_of, widened
from negengine.kernels.triton.schedule import reference_count, updated_images


@triton.jit
def combined(candidate_score, candidate_index, first, splits, T, exists, ROWS: tl.constexpr):
    """The best of the splits' candidates; they ascend, so that of equal scores the lowest index wins."""
    best = tl.full([ROWS], float("-inf"), tl.float32)
    chosen = tl.full([ROWS], NONE, tl.int32)
    for start in range(0, splits, SPLITS):  # all at once: one after another, each would wait for its load
        split = start + tl.arange(0, SPLITS)
        at, there = first[:, None] + split[None, :] * T, exists[:, None] & (split < splits)[None, :]
        score = tl.load(candidate_score + at, mask=there, other=float("-inf"))
        candidate = tl.load(candidate_index + at, mask=there, other=NONE)
        top = tl.max(score, 1)
        lowest = tl.min(tl.where((score == top[:, None]) & (candidate >= 0), candidate, 2147483647), 1)
        better = top > best
        best, chosen = tl.where(better, top, best), tl.where(better, lowest, chosen)
    return chosen


@triton.jit
def pushed(x, r, alpha):
    """``(1 + alpha) x - alpha r``, of float32 products rounded as they are in the other backends."""
    one_plus, minus = (1 + alpha).to(tl.float32), alpha.to(tl.float32)  # 1 + alpha in float64, as Python would
    return narrowed(rounded_product(widened(x), one_plus) - rounded_product(widened(r), minus), x.dtype)


@triton.jit
def extrapolate(x, r, y, alpha, gate, exists, D, IN_PLACE: tl.constexpr, BLOCK_D: tl.constexpr):
    """:func:`pushed` to ``y`` where ``gate``; elsewhere ``x``, bit for bit, unless it is there already."""
    written = exists
    if IN_PLACE:
        written = gate & exists
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        column = (d < D)[None, :]
        before = tl.load(x[:, None] + d[None, :], mask=written[:, None] & column)
        other = tl.load(r[:, None] + d[None, :], mask=(gate & exists)[:, None] & column, other=0)
        tl.store(
            y[:, None] + d[None, :], tl.where(gate[:, None], pushed(before, other, alpha), before), mask=written[:, None] & column
        )


SPLITS = tl.constexpr(8)  # whose candidates are read at once

MERGE_SIZES = [
    "x_b", "x_t", "y_b", "y_t", "bank_b", "bank_t", "mask_b", "mask_t", "keep_b", "keep_t", "alpha_b",
    "B", "K", "T", "M", "D", "R", "weights", "splits", "row_tiles",
]  # fmt: skip
MERGE_SMALL = [
    "moved", "schedule", "references", "inverse", "flags", "candidate_score", "candidate_index", "query_weight", "query_error",
    "mask", "alpha", "threshold", "keep", "stats", "cosine", "index",
]  # fmt: skip


@triton.jit(do_not_specialize=MERGE_SIZES, do_not_specialize_on_alignment=MERGE_SMALL)
def merge_kernel(
    x,  # [B, T, D]
    y,  # out [B, T, D], may be x
    bank,  # [R, M, D]
    snapshot,  # [keys, M, D] and [keys]: rows of images that are overwritten here, see norms_kernel
    moved,
    schedule,  # from norms_kernel, as is inverse
    references,  # [B, K]
    inverse,  # [keys, weights]: 1 / norm
    flags,  # [keys], from match_kernel: whether any key of the image is left to the exact search
    candidate_score,  # [B, splits, T] or [B, splits, CANDIDATES + 1, T], from match_kernel, as is candidate_index
    candidate_index,
    query_weight,  # [queries, T], from norms_kernel, as is query_error, read only if quantised
    query_error,
    mask,  # [R, M], read for release matching only
    alpha,  # [B] float64
    threshold,  # [1] float64
    keep,  # [B, T]
    stats,  # [3] int64
    cosine,  # out [B, T] float32, as is index int32
    index,
    x_b,
    x_t,
    y_b,
    y_t,
    bank_b,
    bank_t,
    mask_b,
    mask_t,
    keep_b,
    keep_t,
    alpha_b,
    B,
    K,
    T,
    M,
    D,
    R,
    weights,
    splits,
    row_tiles,
    RELEASE: tl.constexpr,  # the keys are the sources, the queries the bank
    MERGE: tl.constexpr,  # write y; otherwise cosine and index
    IN_PLACE: tl.constexpr,
    MASKED: tl.constexpr,
    KEPT: tl.constexpr,
    COUNTED: tl.constexpr,
    KEYS_MOVE: tl.constexpr,
    BANK_MOVES: tl.constexpr,
    CAREFUL: tl.constexpr,  # the dtype has magnitudes whose products leave float32, or rows are quantised
    QUANTISED: tl.constexpr,
    VECTOR: tl.constexpr,  # strides and D count this many elements
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid ``(row_tiles * B,)``. A program writes only rows that no other reads: what others need is in the snapshot."""
    image, row = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    exists = row < T
    D = D * VECTOR
    x_b, x_t = tl.cast(x_b, tl.int64) * VECTOR, tl.cast(x_t, tl.int64) * VECTOR
    bank_b, bank_t = tl.cast(bank_b, tl.int64) * VECTOR, tl.cast(bank_t, tl.int64) * VECTOR
    x_rows = x + image.to(tl.int64) * x_b + row.to(tl.int64) * x_t
    y_rows = y + image.to(tl.int64) * y_b * VECTOR + row.to(tl.int64) * y_t * VECTOR
    out = image.to(tl.int64) * T + row
    if COUNTED and tl.program_id(0) == 0:
        tl.atomic_add(stats + 1, updated_images(schedule).to(tl.int64) * T, sem="relaxed")
        tl.atomic_add(stats + 2, 1, sem="relaxed")
    if QUANTISED == 0:  # before the branch, whose condition is a load too
        first = image.to(tl.int64) * splits * T + row
        chosen = combined(candidate_score, candidate_index, first, splits, T, exists, ROWS)
    if reference_count(schedule, image, B) > 0:
        query_rows, query_image, keys, key_b, key_t = x_rows, tl.zeros([ROWS], tl.int32) + image, bank, bank_b, bank_t
        if RELEASE:
            query_image = tl.zeros([ROWS], tl.int32) + tl.load(references + image * K)
            query_rows = rows_of(bank, bank_b, bank_t, snapshot, moved, query_image, row, M, D, BANK_MOVES)
            keys, key_b, key_t = x, x_b, x_t

        everything = exists & False
        if QUANTISED > 0:
            at = query_image.to(tl.int64) * T + row
            chosen, everything = rescored(
                query_rows, tl.load(query_weight + at, mask=exists, other=0), tl.load(query_error + at, mask=exists, other=0),
                exists, keys, key_b, key_t, snapshot, moved, schedule, references, inverse, candidate_score, candidate_index,
                image.to(tl.int64) * splits * (CANDIDATES + 1) * T + row, image, B, K, T, M, D, R, weights, splits,
                RELEASE, KEYS_MOVE, QUANTISED, ROWS, BLOCK_D,
            )  # fmt: skip

        key_rows, factor, token, reference = key_row(
            keys, key_b, key_t, snapshot, moved, schedule, inverse, chosen, image, B, K, M, D, weights, references, R,
            RELEASE, KEYS_MOVE, ROWS,
        )  # fmt: skip
        total, product = products(query_rows, key_rows, exists, D, ROWS, BLOCK_D)
        similarity = cosine_of(total, product, factor)
        finite = is_finite(total)
        if CAREFUL:
            everything = everything | (exists & ~(total <= LARGEST * LARGEST))
            if (tl.max(everything.to(tl.int32), 0) > 0) | any_careful(flags, schedule, image, B, K, RELEASE):
                chosen, similarity, finite = corrected(
                    query_rows, everything, exists, chosen, similarity, keys, key_b, key_t, snapshot, moved, schedule, inverse,
                    image, B, K, M, D, weights, RELEASE, KEYS_MOVE, ROWS, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                key_rows, factor, token, reference = key_row(
                    keys, key_b, key_t, snapshot, moved, schedule, inverse, chosen, image, B, K, M, D, weights, references, R,
                    RELEASE, KEYS_MOVE, ROWS,
                )  # fmt: skip
                total, product = products(query_rows, key_rows, exists, D, ROWS, BLOCK_D)
                # of ordinary rows the cosine has the same bits whichever search chose
                plain = cosine_of(total, product, factor)
                similarity = tl.where((total <= LARGEST * LARGEST) & (plain == plain), plain, similarity)
        found = exists & (chosen >= 0) & finite
        if RELEASE and MASKED:
            allowed = tl.load(mask + query_image.to(tl.int64) * mask_b + row.to(tl.int64) * mask_t, mask=exists, other=0)
            found = found & (allowed != 0)
        similarity = tl.where(found, similarity, float("-inf"))
        if MERGE:
            gate = similarity > tl.load(threshold).to(tl.float32)  # `found &` again, and ptxas 12.8 merges rows without a match
            if KEPT:
                gate = gate & (tl.load(keep + image.to(tl.int64) * keep_b + row.to(tl.int64) * keep_t, mask=exists, other=0) != 0)
            if COUNTED:
                tl.atomic_add(stats, tl.sum(gate.to(tl.int64), 0), sem="relaxed")
            r = rows_of(bank, bank_b, bank_t, snapshot, moved, reference, token, M, D, BANK_MOVES)
            extrapolate(x_rows, r, y_rows, tl.load(alpha + image * alpha_b), gate, exists, D, IN_PLACE, BLOCK_D)
        else:
            tl.store(cosine + out, similarity, mask=exists)
            tl.store(index + out, tl.where(found, chosen, NONE), mask=exists)
    elif MERGE:
        if not IN_PLACE:
            extrapolate(x_rows, x_rows, y_rows, tl.load(alpha + image * alpha_b), exists & False, exists, D, False, BLOCK_D)
    else:
        tl.store(cosine + out, tl.full([ROWS], float("-inf"), tl.float32), mask=exists)
        tl.store(index + out, tl.full([ROWS], NONE, tl.int32), mask=exists)
