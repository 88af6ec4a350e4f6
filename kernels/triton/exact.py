"""Cosines of given pairs of rows, and the search for few rows or few keys in which nothing is out of range."""

from __future__ import annotations

import triton
import triton.language as tl
from negengine.kernels.triton.match import NONE
from negengine.kernels.triton.rows import (
    APART,
    EPS,
    NEVER,
    is_finite,
    rows_of,
    rows_squared,
    scaled_norm,
    widened,
)
from negengine.kernels.triton.schedule import reference_count, reference_of, slot_of


@triton.jit
def products(queries, keys, exists, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum of squares of query rows, and their products with one key row each, for rows of ordinary magnitude."""
    total = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        there = exists[:, None] & (d < D)[None, :]
        q = widened(tl.load(queries[:, None] + d[None, :], mask=there, other=0))
        k = widened(tl.load(keys[:, None] + d[None, :], mask=there, other=0))
        total += tl.sum(q * q, 1)
        product += tl.sum(q * k, 1)
    return total, product


@triton.jit
def cosine_of(total, product, inverse):
    """Cosine of a query row whose squares sum to ``total`` with a key whose norm is ``1 / inverse``."""
    return tl.div_rn(product, tl.maximum(tl.sqrt_rn(total), EPS)) * inverse


@triton.jit
def key_row(keys, key_b, key_t, snapshot, moved, schedule, inverse, chosen, image, B, K, M, D, weights, references, R,
            RELEASE: tl.constexpr, KEYS_MOVE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Of what was chosen: pointers to the key rows, 1 / norm of each, their token, and the image of the bank."""
    slot, token = tl.maximum(chosen, 0) // M, tl.maximum(chosen, 0) % M
    reference = tl.load(references + image * K + slot)
    reference = tl.where((reference >= 0) & (reference < R), reference, 0)
    key_image = reference
    if RELEASE:
        key_image = tl.zeros([ROWS], tl.int32) + image
    rows = rows_of(keys, key_b, key_t, snapshot, moved, key_image, token, M, D, KEYS_MOVE)
    return rows, tl.load(inverse + key_image.to(tl.int64) * weights + token), token, reference


@triton.jit
def any_careful(flags, schedule, image, B, K, RELEASE: tl.constexpr):
    """Whether any key of an image's references is left to the exact search."""
    found = 0
    for number in range(reference_count(schedule, image, B)):
        key_image = image if RELEASE else reference_of(schedule, image, number, B, K)
        found |= tl.load(flags + key_image)
    return found > 0


@triton.jit
def exact_search(
    queries,
    query_scale,
    query_norm,
    everything,
    exists,
    keys,
    key_b,
    key_t,
    snapshot,
    moved,
    schedule,
    inverse,
    image,
    B,
    K,
    M,
    D,
    weights,
    RELEASE: tl.constexpr,
    KEYS_MOVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Best cosine and index of a few rows: over all keys where ``everything``, elsewhere over those that were set apart.

    Every row is scaled by a power of two first, so that no product can overflow. Made to be right; it is seldom needed.
    """
    best = tl.full([ROWS], float("-inf"), tl.float32)
    index = tl.full([ROWS], NONE, tl.int32)
    all_rows = tl.max(everything.to(tl.int32), 0) > 0
    for number in range(reference_count(schedule, image, B)):
        key_image = image if RELEASE else reference_of(schedule, image, number, B, K)
        offset = slot_of(schedule, image, number, B, K) * M
        for start in range(0, M, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            token = tl.minimum(column, M - 1)
            bits = tl.load(inverse + key_image.to(tl.int64) * weights + column).to(tl.int32, bitcast=True)
            eligible, set_apart = bits != NEVER, bits == APART
            if (tl.max(set_apart.to(tl.int32), 0) > 0) | (all_rows & (tl.max(eligible.to(tl.int32), 0) > 0)):
                key_images = tl.zeros([BLOCK_N], tl.int32) + key_image
                rows = rows_of(keys, key_b, key_t, snapshot, moved, key_images, token, M, D, KEYS_MOVE)
                scale, total, _ = rows_squared(rows, eligible, D, BLOCK_N, BLOCK_K)
                product = tl.zeros([ROWS, BLOCK_N], tl.float32)
                for first in range(0, D, BLOCK_K):
                    d = first + tl.arange(0, BLOCK_K)
                    q = widened(tl.load(queries[:, None] + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0))
                    k = widened(tl.load(rows[:, None] + d[None, :], mask=eligible[:, None] & (d < D)[None, :], other=0))
                    q, k = q * query_scale[:, None], k * scale[:, None]
                    product += tl.sum(q[:, None, :] * k[None, :, :], 2)
                cosine = tl.div_rn(tl.div_rn(product, query_norm[:, None]), scaled_norm(scale, total)[None, :])
                wanted = (everything[:, None] & eligible[None, :]) | set_apart[None, :]
                cosine = tl.where(wanted, cosine, float("-inf"))
                top = tl.max(cosine, 1)
                at = tl.min(tl.where(cosine == top[:, None], column[None, :], 2147483647), 1)
                better = top > best  # strict, and keys ascend: of equal cosines the lowest index stays
                best, index = tl.where(better, top, best), tl.where(better, offset + at, index)
    return best, index


@triton.jit
def corrected(
    queries,
    everything,
    exists,
    chosen,
    cosine,
    keys,
    key_b,
    key_t,
    snapshot,
    moved,
    schedule,
    inverse,
    image,
    B,
    K,
    M,
    D,
    weights,
    RELEASE: tl.constexpr,
    KEYS_MOVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What is chosen, with which cosine, once keys that were set apart, or for some rows all keys, are searched exactly.

    And which rows are finite: the others match nothing.
    """
    scale, total, _ = rows_squared(queries, exists, D, ROWS, BLOCK_K)
    finite = is_finite(total)
    best, index = exact_search(
        queries, scale, scaled_norm(scale, total), everything & finite, exists & finite, keys, key_b, key_t, snapshot, moved,
        schedule, inverse, image, B, K, M, D, weights, RELEASE, KEYS_MOVE, ROWS, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    better = everything | (chosen < 0) | (best > cosine) | ((best == cosine) & (index >= 0) & (index < chosen))
    return tl.where(better, index, chosen), tl.where(better, best, cosine), finite
