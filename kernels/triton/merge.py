"""Combine the candidates, take the cosine of the chosen pair anew in float32, gate, and extrapolate."""

from __future__ import annotations

import triton
import triton.language as tl
from negengine.kernels.triton.match import CANDIDATES, NONE, OUT_OF_RANGE
from negengine.kernels.triton.norms import (
    CAREFUL as HARD,
)
from negengine.kernels.triton.norms import (
    INT8,
    in_range,
    is_finite,
    is_updated,
    multiply,
    narrowed,
    power_below_inverse,
    power_inverse,
    scaled_norm,
    widened,
)

FP8_ERROR = tl.constexpr(0.037)  # standard deviation of the relative error of a product of two values with 3 mantissa bits
FP8_SUMS = tl.constexpr(2.0**-13)  # what sums with 13 fraction bits can be off, over DEVIATIONS: four additions a partial sum
DEVIATIONS = tl.constexpr(4.0)  # that a candidate may be off
MEASURED_DEVIATIONS = tl.constexpr(6.0)  # the same, where the deviation is an estimate
HARMLESS = tl.constexpr(0.009)  # by how much a key may be better unseen: the contract of spec.md allows 0.01


@triton.jit
def rows_of(tensor, stride_b, stride_t, snapshot, moved, image, token, M, D, MOVES: tl.constexpr):
    """Pointers to rows, one image and token each."""
    image, token = image.to(tl.int64), token.to(tl.int64)
    rows = tensor + image * stride_b + token * stride_t
    if MOVES:
        rows = tl.where(tl.load(moved + image) > 0, snapshot + (image * M + token) * D, rows)
    return rows


@triton.jit
def query_and_pair(queries, chosen, key_scale, exists, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Scale and scaled square of the query rows, and their scaled products with the chosen keys."""
    peak = tl.zeros([ROWS], tl.float32)
    f = power_below_inverse(peak)
    total = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        there = exists[:, None] & (d < D)[None, :]
        q = widened(tl.load(queries[:, None] + d[None, :], mask=there, other=0))
        k = widened(tl.load(chosen[:, None] + d[None, :], mask=there, other=0)) * key_scale[:, None]
        peak = tl.maximum(peak, tl.max(tl.abs(q), 1))
        smaller = power_below_inverse(peak)
        ratio = smaller * power_inverse(f)
        q *= smaller[:, None]
        total = total * (ratio * ratio) + tl.sum(q * q, 1)
        product = product * ratio + tl.sum(q * k, 1)
        f = smaller
    return f, total, product


@triton.jit
def careful_search(
    queries,
    query_scale,
    exists,
    keys,
    key_b,
    key_t,
    snapshot,
    moved,
    references,
    scale,
    inverse,
    image,
    K,
    M,
    D,
    RELEASE: tl.constexpr,
    KEYS_MOVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The search of match.py for a few rows, every row scaled first: for magnitudes whose products leave float32."""
    best = tl.full([ROWS], float("-inf"), tl.float32)
    index = tl.full([ROWS], NONE, tl.int32)
    d = tl.arange(0, BLOCK_K)
    for slot in range(K):
        reference = tl.load(references + image * K + slot)
        if reference >= 0:
            key_image = reference
            if RELEASE:
                key_image = image
            for key_start in range(0, M, BLOCK_N):
                column = key_start + tl.arange(0, BLOCK_N)
                token = tl.minimum(column, M - 1)
                f = tl.load(scale + key_image * M + token)
                factor = tl.load(inverse + key_image * M + token)
                key_images = tl.zeros([BLOCK_N], tl.int32) + key_image
                rows = rows_of(keys, key_b, key_t, snapshot, moved, key_images, token, M, D, KEYS_MOVE)
                product = tl.zeros([ROWS, BLOCK_N], tl.float32)
                for start in tl.range(0, D, BLOCK_K, num_stages=1):
                    there = d < D - start
                    a = tl.load(queries[:, None] + (start + d)[None, :], mask=exists[:, None] & there[None, :], other=0)
                    b = tl.load(rows[None, :] + (start + d)[:, None], mask=there[:, None], other=0)
                    scaled_a = narrowed(widened(a) * query_scale[:, None], a.dtype)
                    scaled_b = narrowed(widened(b) * f[None, :], b.dtype)
                    product = multiply(scaled_a, scaled_b, product)
                eligible = (column < M) & (factor > 0)
                product = product * factor[None, :] + tl.where(eligible, 0.0, float("-inf"))[None, :]
                top = tl.max(product, 1)
                at = tl.min(tl.where(product == top[:, None], column[None, :], 2147483647), 1)
                better = top > best
                best = tl.where(better, top, best)
                index = tl.where(better, slot * M + at, index)
    return index


@triton.jit
def product_error(query_error, key_error, QUANTISED: tl.constexpr):
    """Bound on the standard deviation of an approximate cosine, from what ``quantise`` says of the two rows.

    int8: errors are as large in every channel. fp8: they are in proportion to the value, so large channels that the two rows
    share count most; by Cauchy and Schwarz their fourth powers bound it, however the channels are spread.
    """
    if QUANTISED == INT8:
        return tl.sqrt(query_error * query_error + key_error * key_error)
    else:
        return FP8_ERROR * query_error * key_error + FP8_SUMS


@triton.jit
def next_candidate(
    candidate_score,
    candidate_index,
    first,
    splits,
    T,
    exists,
    last_score,
    last_index,
    ROWS: tl.constexpr,
):
    """Of a row's candidates the one that follows ``last``, in order of falling score and rising index."""
    score = tl.full([ROWS], float("-inf"), tl.float32)
    index = tl.full([ROWS], NONE, tl.int32)
    for split in range(splits):
        for slot in tl.static_range(CANDIDATES):
            at = first + (split * (CANDIDATES + 1) + slot) * T
            s = tl.load(candidate_score + at, mask=exists, other=float("-inf"))
            i = tl.load(candidate_index + at, mask=exists, other=NONE)
            follows = (i >= 0) & ((s < last_score) | ((s == last_score) & (i > last_index)))
            better = follows & ((s > score) | ((s == score) & (i < index)))
            score, index = tl.where(better, s, score), tl.where(better, i, index)
    return score, index


@triton.jit
def rescored(
    queries,
    query_weight,
    query_error,
    exists,
    keys,
    key_b,
    key_t,
    snapshot,
    moved,
    references,
    scale,
    inverse,
    candidate_score,
    candidate_index,
    first,
    image,
    K,
    T,
    M,
    D,
    splits,
    RELEASE: tl.constexpr,
    KEYS_MOVE: tl.constexpr,
    QUANTISED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The best candidate by its cosine in float32, and whether another key may be better by ``HARMLESS``, or equal."""
    hidden = tl.full([ROWS], float("-inf"), tl.float32)
    key_error = tl.zeros([ROWS], tl.float32)
    careful = exists & (query_weight == HARD)
    for split in range(splits):
        at = first + split * (CANDIDATES + 1) * T
        careful = careful | (exists & (tl.load(candidate_index + at, mask=exists, other=NONE) == OUT_OF_RANGE))
        hidden = tl.maximum(hidden, tl.load(candidate_score + at + CANDIDATES * T, mask=exists, other=float("-inf")))
        error = tl.load(candidate_index + at + CANDIDATES * T, mask=exists, other=0).to(tl.float32, bitcast=True)
        key_error = tl.maximum(key_error, error)
    deviation = product_error(query_error, key_error, QUANTISED)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    chosen = tl.full([ROWS], NONE, tl.int32)
    score, index = next_candidate(
        candidate_score,
        candidate_index,
        first,
        splits,
        T,
        exists,
        tl.full([ROWS], float("inf"), tl.float32),
        chosen,
        ROWS,
    )
    chosen_score = tl.full([ROWS], float("inf"), tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    going = exists & (index >= 0) & ~careful
    while tl.max(going.to(tl.int32), 0) > 0:
        at_least = tl.maximum(index, 0)
        key_image = tl.zeros([ROWS], tl.int32) + image
        if not RELEASE:
            key_image = tl.maximum(tl.load(references + image * K + at_least // M), 0)
        token = at_least % M
        rows = rows_of(keys, key_b, key_t, snapshot, moved, key_image, token, M, D, KEYS_MOVE)
        key_scale = tl.load(scale + key_image * M + token)
        f, total, product = query_and_pair(queries, rows, key_scale, going, D, ROWS, BLOCK_D)
        cosine = tl.div_rn(product, scaled_norm(f, total)) * tl.load(inverse + key_image * M + token)
        better = going & ((cosine > best) | ((cosine == best) & (index < chosen)))
        difference = score * query_weight - cosine
        count += going.to(tl.float32)
        squares += tl.where(going, difference * difference, 0.0)
        best, chosen = tl.where(better, cosine, best), tl.where(better, index, chosen)
        chosen_score = tl.where(better, score, chosen_score)
        score, index = next_candidate(candidate_score, candidate_index, first, splits, T, exists, score, index, ROWS)
        going = going & (index >= 0) & (score * query_weight + DEVIATIONS * deviation >= best)
    # the bound is loose where large channels are not shared: what many candidates of this very row were off says more
    measured = tl.sqrt(squares / tl.maximum(count, 1.0)) * (MEASURED_DEVIATIONS / DEVIATIONS)
    deviation = tl.where(count >= 8, tl.minimum(deviation, measured), deviation)
    careful = careful | (exists & (hidden >= chosen_score))  # equal rows have equal scores, and the lowest of them must win
    careful = careful | (exists & (hidden * query_weight + DEVIATIONS * deviation > best + HARMLESS) & (best > float("-inf")))
    return chosen, careful


@triton.jit
def extrapolate(x, r, y, alpha, gate, exists, D, IN_PLACE: tl.constexpr, BLOCK_D: tl.constexpr):
    """``(1 + alpha) x - alpha r`` to ``y`` where ``gate``; elsewhere ``x``, bit for bit, unless it is there already."""
    # 1 + alpha in float64, as Python would
    one_plus, minus = (1 + alpha).to(tl.float32), alpha.to(tl.float32)
    written = exists
    if IN_PLACE:
        written = gate & exists
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        column = (d < D)[None, :]
        before = tl.load(x[:, None] + d[None, :], mask=written[:, None] & column)
        other = tl.load(r[:, None] + d[None, :], mask=(gate & exists)[:, None] & column, other=0)
        pushed = narrowed(one_plus * widened(before) - minus * widened(other), before.dtype)
        after = tl.where(gate[:, None], pushed, before)
        tl.store(y[:, None] + d[None, :], after, mask=written[:, None] & column)


SIZES = [
    "x_b", "x_t", "y_b", "y_t", "bank_b", "bank_t", "query_b", "query_t", "key_b", "key_t", "mask_b", "mask_t", "keep_b", "keep_t",
    "alpha_b", "B", "K", "T", "M", "D", "splits",
]  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    x,  # [B, T, D]
    y,  # out [B, T, D], may be x
    bank,  # [R, M, D]
    queries,  # x, or bank for release matching
    keys,  # bank, or x for release matching
    snapshot,  # [R or B, M, D] and [R or B]: rows of images that are overwritten here, see norms_kernel
    moved,
    references,  # [B, K]
    scale,  # [R or B, M], from norms_kernel, as is inverse
    inverse,
    candidate_score,  # [B, splits, T] or [B, splits, CANDIDATES + 1, T], from match_kernel, as is candidate_index
    candidate_index,
    query_weight,  # [B or R, T], from norms_kernel, as is query_error, read only if quantised
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
    query_b,
    query_t,
    key_b,
    key_t,
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
    splits,
    RELEASE: tl.constexpr,
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
    """Grid ``(cdiv(T, ROWS), B)``. A program writes only rows that no other reads: what others need is in the snapshot."""
    image = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < T
    D = D * VECTOR
    query_b, query_t = query_b.to(tl.int64) * VECTOR, query_t.to(tl.int64) * VECTOR
    key_b, key_t = key_b.to(tl.int64) * VECTOR, key_t.to(tl.int64) * VECTOR
    bank_b, bank_t = bank_b.to(tl.int64) * VECTOR, bank_t.to(tl.int64) * VECTOR
    x_rows = x + image.to(tl.int64) * x_b * VECTOR + row.to(tl.int64) * x_t * VECTOR
    y_rows = y + image.to(tl.int64) * y_b * VECTOR + row.to(tl.int64) * y_t * VECTOR
    out = image.to(tl.int64) * T + row
    updated = is_updated(references, image, K)
    if COUNTED and (tl.program_id(0) == 0) & (image == 0):
        tl.atomic_add(stats + 2, 1)
    if updated:
        query_image = tl.zeros([ROWS], tl.int32) + image
        if RELEASE:
            query_image = tl.zeros([ROWS], tl.int32) + tl.load(references + image * K)
        query_rows = rows_of(
            queries,
            query_b,
            query_t,
            snapshot,
            moved,
            query_image,
            row,
            M,
            D,
            RELEASE and BANK_MOVES,
        )
        if QUANTISED > 0:
            at = query_image.to(tl.int64) * T + row
            chosen, uncertain = rescored(
                query_rows, tl.load(query_weight + at, mask=exists, other=0), tl.load(query_error + at, mask=exists, other=0),
                exists, keys, key_b, key_t, snapshot, moved, references, scale, inverse, candidate_score, candidate_index,
                image.to(tl.int64) * splits * (CANDIDATES + 1) * T + row, image, K, T, M, D, splits,
                RELEASE, KEYS_MOVE, QUANTISED, ROWS, BLOCK_D,
            )  # fmt: skip
            careful = uncertain.to(tl.int32)
        else:
            best = tl.full([ROWS], float("-inf"), tl.float32)
            chosen = tl.full([ROWS], NONE, tl.int32)
            careful = tl.zeros([ROWS], tl.int32)
            for split in range(splits):
                at = (image.to(tl.int64) * splits + split) * T + row
                score = tl.load(candidate_score + at, mask=exists, other=float("-inf"))
                candidate = tl.load(candidate_index + at, mask=exists, other=NONE)
                careful |= (candidate == OUT_OF_RANGE).to(tl.int32)
                better = score > best  # strict, and splits ascend: of equal scores the lowest index wins
                best = tl.where(better, score, best)
                chosen = tl.where(better, candidate, chosen)
        slot, token = tl.maximum(chosen, 0) // M, tl.maximum(chosen, 0) % M
        reference = tl.maximum(tl.load(references + image * K + slot), 0)
        key_image = reference
        if RELEASE:
            key_image = tl.zeros([ROWS], tl.int32) + image
        key_rows = rows_of(keys, key_b, key_t, snapshot, moved, key_image, token, M, D, KEYS_MOVE)
        key_scale = tl.load(scale + key_image * M + token)
        found = exists & (chosen >= 0)
        f, total, product = query_and_pair(query_rows, key_rows, key_scale, exists, D, ROWS, BLOCK_D)
        if CAREFUL:
            if QUANTISED == 0:
                careful |= (exists & is_finite(total) & (total > 0) & ~in_range(f)).to(tl.int32)
            if tl.max(careful, 0) > 0:
                again = careful_search(
                    query_rows, f, exists, keys, key_b, key_t, snapshot, moved, references, scale, inverse,
                    image, K, M, D, RELEASE, KEYS_MOVE, ROWS, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                chosen = tl.where(careful > 0, again, chosen)
                slot, token = tl.maximum(chosen, 0) // M, tl.maximum(chosen, 0) % M
                reference = tl.maximum(tl.load(references + image * K + slot), 0)
                if not RELEASE:
                    key_image = reference
                key_rows = rows_of(
                    keys,
                    key_b,
                    key_t,
                    snapshot,
                    moved,
                    key_image,
                    token,
                    M,
                    D,
                    KEYS_MOVE,
                )
                key_scale = tl.load(scale + key_image * M + token)
                f, total, product = query_and_pair(query_rows, key_rows, key_scale, exists, D, ROWS, BLOCK_D)
        found = exists & (chosen >= 0) & is_finite(total)
        if RELEASE and MASKED:
            found = found & (
                tl.load(mask + query_image.to(tl.int64) * mask_b + row.to(tl.int64) * mask_t, mask=exists, other=0) != 0
            )
        similarity = tl.div_rn(product, scaled_norm(f, total)) * tl.load(inverse + key_image * M + token)
        similarity = tl.where(found, similarity, float("-inf"))
        if MERGE:
            gate = found & (similarity > tl.load(threshold).to(tl.float32))
            if KEPT:
                gate = gate & (tl.load(keep + image.to(tl.int64) * keep_b + row.to(tl.int64) * keep_t, mask=exists, other=0) != 0)
            if COUNTED:
                tl.atomic_add(stats, tl.sum(gate.to(tl.int64), 0))
                tl.atomic_add(stats + 1, tl.sum(exists.to(tl.int64), 0))
            r = rows_of(
                bank,
                bank_b,
                bank_t,
                snapshot,
                moved,
                reference,
                token,
                M,
                D,
                BANK_MOVES,
            )
            extrapolate(x_rows, r, y_rows, tl.load(alpha + image * alpha_b), gate, exists, D, IN_PLACE, BLOCK_D)
        else:
            tl.store(cosine + out, similarity, mask=exists)
            tl.store(index + out, tl.where(found, chosen, NONE), mask=exists)
    elif MERGE:
        if not IN_PLACE:
            nothing = tl.zeros([ROWS], tl.int1)
            extrapolate(x_rows, x_rows, y_rows, tl.load(alpha + image * alpha_b), nothing, exists, D, IN_PLACE, BLOCK_D)
    else:
        tl.store(cosine + out, tl.full([ROWS], float("-inf"), tl.float32), mask=exists)
        tl.store(index + out, tl.full([ROWS], NONE, tl.int32), mask=exists)


@triton.jit(do_not_specialize=["x_b", "x_t", "bank_b", "bank_t", "index_b", "gate_b", "gate_t", "alpha_b", "K", "T", "M", "D"])
def apply_kernel(
    x,  # [B, T, D]
    y,  # out [B, T, D], contiguous
    bank,  # [R, M, D]
    references,  # [B, K]
    index,  # [B, T], as match gives it
    gate,  # [B, T]
    alpha,  # [B] float64
    x_b,
    x_t,
    bank_b,
    bank_t,
    index_b,
    gate_b,
    gate_t,
    alpha_b,
    K,
    T,
    M,
    D,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The merge alone, of a choice and a gate that are given. Grid ``(cdiv(T, ROWS), B)``."""
    image = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < T
    D = D * VECTOR
    bank_b, bank_t = bank_b.to(tl.int64) * VECTOR, bank_t.to(tl.int64) * VECTOR
    x_rows = x + image.to(tl.int64) * x_b * VECTOR + row.to(tl.int64) * x_t * VECTOR
    y_rows = y + (image.to(tl.int64) * T + row) * D
    chosen = tl.maximum(tl.load(index + image * index_b + row, mask=exists, other=0), 0)
    reference = tl.maximum(tl.load(references + image * K + chosen // M), 0)
    r = rows_of(bank, bank_b, bank_t, bank, index, reference, chosen % M, M, D, False)
    merged = tl.load(gate + image * gate_b + row.to(tl.int64) * gate_t, mask=exists, other=0) != 0
    extrapolate(x_rows, r, y_rows, tl.load(alpha + image * alpha_b), merged, exists, D, False, BLOCK_D)
