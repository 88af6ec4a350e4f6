"""Before the search: weights of the rows that it may choose, copies of rows that will be overwritten, codes, the schedule."""

from __future__ import annotations

import triton
import triton.language as tl
from negengine.kernels.triton.codes import MOST_LOST, quantise
from negengine.kernels.triton.rows import APART, LARGEST, NEVER, is_finite, power_inverse, rows_squared, scaled_norm
from negengine.kernels.triton.schedule import is_referenced, is_updated, write_schedule

PADDING = tl.constexpr(256)  # weights of an image are padded to a multiple of this, so that the search reads them without a mask

# values of OVERWRITTEN: which keys are overwritten while others may still read them
NOTHING = tl.constexpr(0)
NOT_READ = tl.constexpr(1)  # images that have references, of which none is one: the caller's promise
UPDATED = tl.constexpr(2)  # images that have references
ANYTHING = tl.constexpr(3)  # the keys share memory with the output, and nothing more is known

NORMS_SIZES = [
    "x_b", "x_t", "bank_b", "bank_t", "mask_b", "mask_t", "B", "K", "T", "M", "D", "weights", "padded", "R", "tiles",
]  # fmt: skip
NORMS_SMALL = [
    "references", "mask", "weight", "inverse", "apart", "schedule", "moved", "key_error", "query_error", "query_weight",
]  # fmt: skip


@triton.jit
def weigh(weight, inverse, apart, plain, factor, fits, eligible, column, image, tile, weights, tiles, QUANTISED: tl.constexpr):
    """Store what the search multiplies scores with, and whether any of these keys is left to the exact search."""
    mark = tl.where(eligible, APART, NEVER).to(tl.int32).to(tl.float32, bitcast=True)
    out, there = image.to(tl.int64) * weights + column, column < weights
    tl.store(weight + out, tl.where(eligible & fits, plain, mark), mask=there)
    if QUANTISED > 0:  # otherwise the two are one
        tl.store(inverse + out, tl.where(eligible & fits, factor, mark), mask=there)
    tl.store(apart + image * tiles + tile, tl.max((eligible & ~fits).to(tl.int32), 0))


@triton.jit(do_not_specialize=NORMS_SIZES, do_not_specialize_on_alignment=NORMS_SMALL)
def norms_kernel(
    x,  # [B, T, D]
    bank,  # [R, M, D]
    references,  # [B, K]
    mask,  # [R, M]
    weight,  # out [keys, weights]: 1 / max(norm, eps) of the row or of its code, or NEVER, or APART
    inverse,  # out [keys, weights]: the same of the row itself, if quantised
    apart,  # out int8 [keys, tiles]: whether any of these keys is APART
    schedule,  # out, see schedule.py
    snapshot,  # out [keys, M, D]: rows that are read after they may have been overwritten
    moved,  # out [keys]: images whose rows are to be read from the snapshot
    key_codes,  # out [keys, M, padded]: rows in 8 bits, if quantised
    query_codes,  # out [queries, T, padded], key_codes if the queries are the keys' tensor
    key_error,  # out [keys, weights]: see quantise
    query_error,  # out [queries, T]
    query_weight,  # out [queries, T]: 1 / max(norm, eps) of the code, NaN where the code will not do
    x_b,
    x_t,
    bank_b,
    bank_t,
    mask_b,
    mask_t,
    B,
    K,
    T,
    M,
    D,
    weights,
    padded,
    R,
    tiles,
    RELEASE: tl.constexpr,  # the keys are the sources, the queries the bank
    MASKED: tl.constexpr,
    OVERWRITTEN: tl.constexpr,
    QUANTISED: tl.constexpr,
    OWN: tl.constexpr,  # the bank is x
    VECTOR: tl.constexpr,  # strides and D count this many elements: divisibility without compiling for every size
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid ``(tiles * (images of keys + images of queries that need codes of their own),)``, ``tiles`` of ROWS rows each.

    Images that nothing refers to cost one look at the table.
    """
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    D = D * VECTOR
    x_b, x_t = tl.cast(x_b, tl.int64) * VECTOR, tl.cast(x_t, tl.int64) * VECTOR
    bank_b, bank_t = tl.cast(bank_b, tl.int64) * VECTOR, tl.cast(bank_t, tl.int64) * VECTOR
    row = tile * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) == 0:
        write_schedule(schedule, references, B, K, R)
    if RELEASE:
        keys, key_b, key_t, key_images = x, x_b, x_t, B
        queries, query_b, query_t = bank, bank_b, bank_t
    else:
        keys, key_b, key_t, key_images = bank, bank_b, bank_t, R
        queries, query_b, query_t = x, x_b, x_t
    if image < key_images:
        exists, token = row < M, tl.minimum(row, M - 1).to(tl.int64)
        updated = False
        if RELEASE or OWN or (OVERWRITTEN > NOTHING and OVERWRITTEN < ANYTHING):  # then the keys' images are those of x
            updated = is_updated(references, image, K, R)
        referenced = is_referenced(references, image, B * K)
        used = updated if RELEASE else referenced
        both = used
        if OVERWRITTEN > NOTHING and OVERWRITTEN < ANYTHING:
            both = used & updated
        MOVES: tl.constexpr = OVERWRITTEN >= UPDATED
        if MOVES:
            tl.store(moved + image, both.to(tl.int32))
        asks = False
        if QUANTISED > 0 and OWN:
            asks = referenced if RELEASE else updated
        if used | asks:
            source = keys + image.to(tl.int64) * key_b + token * key_t
            f, total, peak = rows_squared(source, exists, D, ROWS, BLOCK_D)
            eligible = exists & is_finite(total)
            if RELEASE:  # the index chosen among sources is used to pick a reference token
                other = tl.load(references + image * K)
                other = tl.where((other >= 0) & (other < R), other, 0).to(tl.int64)
                partner = rows_squared(bank + other * bank_b + token * bank_t, exists, D, ROWS, BLOCK_D)
                eligible = eligible & is_finite(partner[1])
            elif MASKED:
                eligible = eligible & (tl.load(mask + image.to(tl.int64) * mask_b + token * mask_t, mask=exists, other=0) != 0)
            if OVERWRITTEN == NOT_READ:
                eligible = eligible & ~both
            factor = tl.div_rn(1.0, scaled_norm(f, total)) * f
            fits = tl.sqrt(total) * power_inverse(f) <= LARGEST
            plain = factor
            if QUANTISED > 0:
                codes = key_codes + (image.to(tl.int64) * M + token) * padded
                size, error, lost = quantise(source, codes, exists, f, total, peak, D, padded, QUANTISED, ROWS, BLOCK_D)
                fits = fits & (lost <= MOST_LOST)
                plain = tl.div_rn(1.0, scaled_norm(f, total)) / size
                out = image.to(tl.int64) * weights + row
                tl.store(key_error + out, tl.where(eligible & fits, error, 0.0), mask=row < weights)
                if OWN:
                    tl.store(query_error + image.to(tl.int64) * T + row, error, mask=exists)
                    tl.store(query_weight + image.to(tl.int64) * T + row, tl.where(fits, plain, float("nan")), mask=exists)
            weigh(weight, inverse, apart, plain, factor, fits, eligible, row, image, tile, weights, tiles, QUANTISED)
            if MOVES and both:
                target = snapshot + (image.to(tl.int64) * M + token) * D
                for start in range(0, D, BLOCK_D):
                    d = start + tl.arange(0, BLOCK_D)
                    there = exists[:, None] & (d < D)[None, :]
                    tl.store(target[:, None] + d[None, :], tl.load(source[:, None] + d[None, :], mask=there), mask=there)
    elif QUANTISED > 0 and not OWN:  # else no such program runs, and a traced graph would see codes written twice
        image -= key_images
        asks = is_referenced(references, image, B * K) if RELEASE else is_updated(references, image, K, R)
        if asks:
            exists, token = row < T, tl.minimum(row, T - 1).to(tl.int64)
            source = queries + image.to(tl.int64) * query_b + token * query_t
            f, total, peak = rows_squared(source, exists, D, ROWS, BLOCK_D)
            codes = query_codes + (image.to(tl.int64) * T + token) * padded
            size, error, lost = quantise(source, codes, exists, f, total, peak, D, padded, QUANTISED, ROWS, BLOCK_D)
            out = image.to(tl.int64) * T + row
            plain = tl.div_rn(1.0, scaled_norm(f, total)) / size
            fits = (lost <= MOST_LOST) & (tl.sqrt(total) * power_inverse(f) <= LARGEST)
            tl.store(query_error + out, error, mask=exists)
            tl.store(query_weight + out, tl.where(fits, plain, float("nan")), mask=exists)
