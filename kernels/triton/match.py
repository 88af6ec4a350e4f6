"""Search: the key of greatest cosine for every query, as a matrix product whose tiles are reduced where they are made.

For ``paper`` matching the queries are source tokens and the keys reference tokens, for ``release`` the other way round.
Only the keys' norms enter: that of the query changes no order. Every ``(row tile, split)`` leaves one candidate per query, or,
where rows were quantised, ``CANDIDATES`` and a bound on the scores of all others.
"""

from __future__ import annotations

import triton
import triton.language as tl
from negengine.kernels.triton.rows import INT8, multiply, rounded_product
from negengine.kernels.triton.schedule import reference_count, reference_of, slot_of, updated_image, updated_images

NONE = tl.constexpr(-1)
LANES = tl.constexpr(8)  # groups of columns that keep two candidates each: in a fragment of a matrix product a thread's own
HUGE = tl.constexpr(2.0**120)
CANDIDATES = tl.constexpr(4)  # quantised candidates that leave a split


@triton.jit
def work_of(unit, schedule, images, B, row_tiles, key_tiles, splits, GROUP: tl.constexpr):
    """Of a unit of work: image, row tile, split, and the first and last of the image's key tiles that it takes.

    Units that run together share few row tiles and few key tiles, so that both stay in the cache.
    """
    first = unit // (GROUP * splits) * GROUP
    height = tl.minimum(images * row_tiles - first, GROUP)
    within = unit % (GROUP * splits)
    row_tile, split = first + within % height, within // height
    image = updated_image(schedule, row_tile // row_tiles)
    tiles = reference_count(schedule, image, B) * key_tiles
    return image, row_tile % row_tiles, split, split * tiles // splits, (split + 1) * tiles // splits


@triton.jit
def any_of(flags, count):
    """Whether any of ``count`` bytes is not zero."""
    found = 0
    for start in range(0, count, 1024):
        at = start + tl.arange(0, 1024)
        found |= tl.max(tl.load(flags + at, mask=at < count, other=0).to(tl.int32), 0)
    return found


@triton.jit
def scores(
    queries,
    keys,
    query_rows,
    key_rows,
    query_image,
    key_image,
    query_start,
    key_start,
    D,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    QUANTISED: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """``[BLOCK_M, BLOCK_N]`` products of queries and keys in float32."""
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if QUANTISED == INT8 else tl.float32)
    if DESCRIPTORS:
        for start in tl.range(0, D, BLOCK_K, warp_specialize=SPECIALIZE):
            a = queries.load([query_image, query_start, start]).reshape(BLOCK_M, BLOCK_K)
            b = keys.load([key_image, key_start, start]).reshape(BLOCK_N, BLOCK_K)
            product = multiply(a, b.T, product, PARTIAL)
    else:
        d = tl.arange(0, BLOCK_K)
        left = query_rows[:, None] + d[None, :]
        right = key_rows[None, :] + d[:, None]
        for start in range(0, D, BLOCK_K):
            if EVEN_K:
                a = tl.load(left)
                b = tl.load(right)
            else:
                a = tl.load(left, mask=(d < D - start)[None, :], other=0.0)
                b = tl.load(right, mask=(d < D - start)[:, None], other=0.0)
            product = multiply(a, b, product, PARTIAL)
            left += BLOCK_K
            right += BLOCK_K
    return product.to(tl.float32)


@triton.jit
def fold(product, weight, start, offset, best, index, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVINGS: tl.constexpr):
    """Best score and index of each row, with the keys ``start ...`` of an image taken in."""
    if HALVINGS > 0:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = product.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        best, index = fold(left, weight, start, offset, best, index, BLOCK_M, HALF, HALVINGS - 1)
        best, index = fold(right, weight, start + HALF, offset, best, index, BLOCK_M, HALF, HALVINGS - 1)
        return best, index
    else:
        column = start + tl.arange(0, BLOCK_N)
        score = rounded_product(product, tl.load(weight + column)[None, :])
        lane_top, lane_at = lane_maxima(score, BLOCK_M, BLOCK_N)
        top = tl.max(lane_top, 1)
        at = tl.min(tl.where(lane_top == top[:, None], lane_at, 2147483647), 1)
        better = top > best  # strict: of equal scores the lower index stays
        return tl.where(better, top, best), tl.where(better, offset + start + at, index)


@triton.jit
def lane_maxima(score, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The greatest score of each row and lane ``[BLOCK_M, LANES]``, and the lowest column that has it.

    No comparison but the maximum: one per score would wait for the last's predicate, 13 cycles on sm_90. What a score lacks to the
    maximum, times a huge number, plus its place in the lane, is the place where it lacks nothing and huge elsewhere. Scores must be
    rounded for that: against an unrounded product even the maximum would lack something.
    """
    DEPTH: tl.constexpr = BLOCK_N // LANES
    score = score.reshape(BLOCK_M, DEPTH, LANES)
    top = tl.max(score, 1)
    place = tl.arange(0, DEPTH).to(tl.float32)[None, :, None]
    at = tl.min((top[:, None, :] - score) * HUGE + place, 1)
    at = tl.minimum(at, DEPTH - 1).to(tl.int32)  # where no key can be chosen, it is not a number
    return top, at * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def fold_lanes(
    product,
    weight,
    start,
    offset,
    best,
    index,
    second,
    second_index,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """The two best scores and their indices of each row and lane ``[BLOCK_M, LANES]``, with the keys ``start ...`` taken in."""
    if HALVINGS > 0:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = product.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        best, index, second, second_index = fold_lanes(
            left, weight, start, offset, best, index, second, second_index, BLOCK_M, HALF, HALVINGS - 1
        )
        best, index, second, second_index = fold_lanes(
            right, weight, start + HALF, offset, best, index, second, second_index, BLOCK_M, HALF, HALVINGS - 1
        )
        return best, index, second, second_index
    else:
        DEPTH: tl.constexpr = BLOCK_N // LANES
        column = start + tl.arange(0, BLOCK_N)
        score = product * tl.load(weight + column)[None, :]
        score = score.reshape(BLOCK_M, DEPTH, LANES)
        step = tl.arange(0, DEPTH)[None, :, None]
        top = tl.max(score, 1)
        at = tl.min(tl.where(score == top[:, None, :], step, 2147483647), 1)
        score = tl.where(step == at[:, None, :], float("-inf"), score)
        runner = tl.max(score, 1)
        runner_at = tl.min(tl.where(score == runner[:, None, :], step, 2147483647), 1)
        first = (offset + start) + tl.arange(0, LANES)[None, :]
        # strict comparisons: of equal scores the lower index stays
        better = top > best
        other = tl.where(better, best, second)
        other_index = tl.where(better, index, second_index)
        rival = tl.where(better, runner, top)
        rival_index = first + LANES * tl.where(better, runner_at, at)
        wins = rival > other
        best, index = tl.where(better, top, best), tl.where(better, first + LANES * at, index)
        return best, index, tl.where(wins, rival, other), tl.where(wins, rival_index, other_index)


@triton.jit
def store_lanes(
    candidate_score, candidate_index, out, T, exists, best, index, second, second_index, key_error, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The best ``CANDIDATES`` of the lanes, then a bound on all other scores, with ``key_error`` in place of an index."""
    hidden = tl.full([BLOCK_M], float("-inf"), tl.float32)
    taken = tl.zeros([BLOCK_M, LANES], tl.int32)
    for slot in tl.static_range(CANDIDATES):
        top = tl.max(best, 1)
        at = tl.min(tl.where(best == top[:, None], index, 2147483647), 1)
        hit = (best == top[:, None]) & (index == at[:, None])
        # a lane that has given both may hide a third
        hidden = tl.maximum(hidden, tl.max(tl.where(hit & (taken > 0), best, float("-inf")), 1))
        best, second = tl.where(hit, second, best), tl.where(hit, float("-inf"), second)
        index = tl.where(hit, second_index, index)
        taken += hit.to(tl.int32)
        tl.store(candidate_score + out + slot * T, top, mask=exists)
        tl.store(candidate_index + out + slot * T, tl.where(top > float("-inf"), at, NONE), mask=exists)
    tl.store(candidate_score + out + CANDIDATES * T, tl.maximum(hidden, tl.max(best, 1)), mask=exists)
    error = tl.zeros([BLOCK_M], tl.float32) + key_error
    tl.store(candidate_index + out + CANDIDATES * T, error.to(tl.int32, bitcast=True), mask=exists)


MATCH_SIZES = ["query_b", "query_t", "key_b", "key_t", "B", "K", "T", "M", "D", "weights", "splits", "R", "row_blocks"]
MATCH_SMALL = ["apart", "flags", "schedule", "weight", "key_error", "candidate_score", "candidate_index"]


@triton.jit(do_not_specialize=MATCH_SIZES, do_not_specialize_on_alignment=MATCH_SMALL)
def match_kernel(
    queries,  # [queries, T, D], pointer or descriptor, of the rows or of their codes
    keys,  # [keys, M, D], likewise
    apart,  # from norms_kernel, as are schedule, weight and key_error
    flags,  # out [keys]: whether any key of the image is left to the exact search
    schedule,
    weight,  # [keys, weights]
    key_error,  # [keys, weights], read only if quantised
    candidate_score,  # out [B, splits, T] float32; if quantised [B, splits, CANDIDATES + 1, T], see store_lanes
    candidate_index,  # out [B, splits, T] int32: slot * M + token, or NONE
    query_b,
    query_t,
    key_b,
    key_t,
    B,
    K,
    T,
    M,
    D,
    weights,
    splits,  # of the keys of each image; at most as many as an image has key tiles
    R,  # images of keys
    row_blocks,  # that apart has per image
    RELEASE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    VECTOR: tl.constexpr,  # strides and D count this many elements
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALVINGS: tl.constexpr,  # how often the tile is cut before it is reduced, to save registers
    FLATTEN: tl.constexpr,  # one loop over the channels of all tiles: the next tile is loaded while this one is reduced
    SPECIALIZE: tl.constexpr,  # some warps load, others multiply
    QUANTISED: tl.constexpr,
    PARTIAL: tl.constexpr,  # see rows.multiply
):
    """Any grid ``(programs,)``: units of work, one per row tile and split of an image that has references, are dealt in turn."""
    D = D * VECTOR
    query_b, query_t = tl.cast(query_b, tl.int64) * VECTOR, tl.cast(query_t, tl.int64) * VECTOR
    key_b, key_t = tl.cast(key_b, tl.int64) * VECTOR, tl.cast(key_t, tl.int64) * VECTOR
    images, row_tiles, key_tiles = updated_images(schedule), tl.cdiv(T, BLOCK_M), tl.cdiv(M, BLOCK_N)
    units = images * row_tiles * splits
    program, programs = tl.program_id(0), tl.num_programs(0)
    for key_image in range(program, R, programs):
        tl.store(flags + key_image, any_of(apart + key_image * row_blocks, row_blocks))
    tiles = 0
    for unit in range(program, units, programs):
        work = work_of(unit, schedule, images, B, row_tiles, key_tiles, splits, GROUP)
        tiles += work[4] - work[3]

    unit, tile, end = program - programs, 0, 0
    image, row_tile, split = 0, 0, 0
    tl.assume(D > 0)
    if QUANTISED > 0:
        best = tl.full([BLOCK_M, LANES], float("-inf"), tl.float32)
        index = tl.full([BLOCK_M, LANES], NONE, tl.int32)
    else:
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        index = tl.full([BLOCK_M], NONE, tl.int32)
    second, second_index = best, index
    error = 0.0
    for _ in tl.range(0, tiles, flatten=FLATTEN):
        # All that the next round needs is known before this round's product: else the flattened loop would load nothing ahead.
        # The minimum changes nothing; it is there so that `end` counts among what the loads need.
        tile += 1
        if tile >= end:
            unit += programs
            image, row_tile, split, tile, end = work_of(unit, schedule, images, B, row_tiles, key_tiles, splits, GROUP)
        at = tl.minimum(tile, end - 1)
        number, key_start = at // key_tiles, at % key_tiles * BLOCK_N
        key_image, query_image = reference_of(schedule, image, number, B, K), image
        if RELEASE:
            key_image, query_image = image, key_image
        query_start = row_tile * BLOCK_M
        query_rows, key_rows = queries, keys
        if not DESCRIPTORS:
            row = tl.minimum(query_start + tl.arange(0, BLOCK_M), T - 1)
            token = tl.minimum(key_start + tl.arange(0, BLOCK_N), M - 1)
            query_rows = queries + query_image.to(tl.int64) * query_b + row.to(tl.int64) * query_t
            key_rows = keys + key_image.to(tl.int64) * key_b + token.to(tl.int64) * key_t
        product = scores(
            queries, keys, query_rows, key_rows, query_image, key_image, query_start, key_start, D,
            DESCRIPTORS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, SPECIALIZE, QUANTISED, PARTIAL,
        )  # fmt: skip
        offset = slot_of(schedule, image, number, B, K) * M
        weighed = weight + key_image.to(tl.int64) * weights
        if QUANTISED > 0:
            column = key_start + tl.arange(0, BLOCK_N)
            error = tl.maximum(error, tl.max(tl.load(key_error + key_image.to(tl.int64) * weights + column), 0))
            best, index, second, second_index = fold_lanes(
                product, weighed, key_start, offset, best, index, second, second_index, BLOCK_M, BLOCK_N, HALVINGS
            )
        else:
            best, index = fold(product, weighed, key_start, offset, best, index, BLOCK_M, BLOCK_N, HALVINGS)
        last = tile + 1 == end
        row = query_start + tl.arange(0, BLOCK_M)
        part = image.to(tl.int64) * splits + split
        if QUANTISED > 0:
            if last:
                out = part * (CANDIDATES + 1) * T + row
                store_lanes(candidate_score, candidate_index, out, T, row < T, best, index, second, second_index, error, BLOCK_M)
            second = tl.where(last, float("-inf"), second)
            error = tl.where(last, 0.0, error)
        else:
            tl.store(candidate_score + part * T + row, best, mask=last & (row < T))
            tl.store(candidate_index + part * T + row, index, mask=last & (row < T))
        best, index = tl.where(last, float("-inf"), best), tl.where(last, NONE, index)
