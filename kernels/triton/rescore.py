"""Candidates of a search in 8 bits, scored again by their cosines in float32."""

from __future__ import annotations

import triton
import triton.language as tl
from negengine.kernels.triton.codes import product_error
from negengine.kernels.triton.exact import cosine_of, key_row, products
from negengine.kernels.triton.match import CANDIDATES, NONE

DEVIATIONS = tl.constexpr(4.0)  # that a candidate may be off
MEASURED_DEVIATIONS = tl.constexpr(6.0)  # the same, where the deviation is an estimate
HARMLESS = tl.constexpr(0.009)  # by how much a key may be better unseen: the contract allows 0.01


@triton.jit
def next_candidate(candidate_score, candidate_index, first, splits, T, exists, last_score, last_index, ROWS: tl.constexpr):
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
    schedule,
    references,
    inverse,
    candidate_score,
    candidate_index,
    first,
    image,
    B,
    K,
    T,
    M,
    D,
    R,
    weights,
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
    for split in range(splits):
        at = first + (split * (CANDIDATES + 1) + CANDIDATES) * T
        hidden = tl.maximum(hidden, tl.load(candidate_score + at, mask=exists, other=float("-inf")))
        error = tl.load(candidate_index + at, mask=exists, other=0).to(tl.float32, bitcast=True)
        key_error = tl.maximum(key_error, error)
    uncertain = exists & (query_weight != query_weight)
    deviation = product_error(query_error, key_error, QUANTISED)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    chosen = tl.full([ROWS], NONE, tl.int32)
    chosen_score = tl.full([ROWS], float("inf"), tl.float32)
    score, index = next_candidate(candidate_score, candidate_index, first, splits, T, exists, chosen_score, chosen, ROWS)
    count = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    going = exists & (index >= 0) & ~uncertain
    while tl.max(going.to(tl.int32), 0) > 0:
        rows, factor, _, _ = key_row(
            keys, key_b, key_t, snapshot, moved, schedule, inverse, index, image, B, K, M, D, weights, references, R,
            RELEASE, KEYS_MOVE, ROWS,
        )  # fmt: skip
        total, product = products(queries, rows, going, D, ROWS, BLOCK_D)
        cosine = cosine_of(total, product, factor)
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
    uncertain = uncertain | (exists & (hidden >= chosen_score))  # equal rows have equal scores; the lowest of them must win
    uncertain = uncertain | (exists & (hidden * query_weight + DEVIATIONS * deviation > best + HARMLESS) & (best > float("-inf")))
    return chosen, uncertain
