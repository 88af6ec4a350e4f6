"""Norms of the rows that a search may choose, and the arithmetic on rows that the other kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
CAREFUL = tl.constexpr(float("inf"))  # a weight: the key needs the careful search of the merge kernel
INT8, FP8 = tl.constexpr(1), tl.constexpr(2)  # values of QUANTISED; 0: the search reads the rows themselves
MOST_LOST = tl.constexpr(0.01)  # of a row's norm: what an int8 code may lose of channels that become zero


@triton.jit
def power_below_inverse(peak):
    """A power of two ``f`` with ``1 <= peak * f < 2`` (as far as the exponent range goes), for float32."""
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 255
    return (tl.minimum(tl.maximum(254 - exponent, 1), 253) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power_inverse(f):
    """``1 / f`` of a power of two from :func:`power_below_inverse`, exact."""
    return ((254 << 23) - f.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def widened(v):
    """``v`` in float32."""
    if INTERPRETED and v.dtype == tl.bfloat16:  # whose conversions there are slow one way and not rounded the other
        return (v.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return v.to(tl.float32)


@triton.jit
def narrowed(v, dtype: tl.constexpr):
    """Float32 rounded to ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        return ((bits + 32767 + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return v.to(dtype)


@triton.jit
def multiply(a, b, product, PARTIAL: tl.constexpr = False):
    """``product + a @ b``, accumulated in float32, or in int32 where ``product`` is.

    PARTIAL: the product is a sum of its own and then added, for matrix units whose own sums keep fewer bits.
    """
    if PARTIAL:
        return product + tl.dot(a, b, max_num_imprecise_acc=a.shape[1])  # with a limit the compiler does not fuse the addition
    if INTERPRETED and a.dtype == tl.bfloat16:  # of which the interpreter would multiply the bit patterns
        return tl.dot(widened(a), widened(b), product, input_precision="ieee")
    return tl.dot(a, b, product, input_precision="ieee", out_dtype=product.dtype)


@triton.jit
def in_range(f):
    """Whether rows scaled by ``f`` could go unscaled: no product of two such rows overflows float32 or loses bits."""
    return (f >= 2.0**-48) & (f <= 2.0**48)


@triton.jit
def is_finite(total):
    return (total == total) & (total < float("inf"))


@triton.jit
def scaled_norm(f, total):
    """``max(|v|, eps) * f`` of a row whose entries, times ``f``, have squares that sum to ``total``."""
    return tl.maximum(tl.sqrt_rn(total), f * EPS)  # the other way round the interpreter of Triton 3.7 takes no product


@triton.jit
def rows_squared(pointers, exists, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Scale, scaled sum of squares and scaled peak of rows; the sum is not finite if, and only if, the row is not.

    Squares of bfloat16 and float32 overflow and vanish, so every row is scaled by a power of two, which is exact.
    """
    peak = tl.zeros([ROWS], tl.float32)
    f = power_below_inverse(peak)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        v = widened(tl.load(pointers[:, None] + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0))
        peak = tl.maximum(peak, tl.max(tl.abs(v), 1))
        smaller = power_below_inverse(peak)
        ratio = smaller * power_inverse(f)
        v *= smaller[:, None]
        total = total * (ratio * ratio) + tl.sum(v * v, 1)
        f = smaller
    return f, total, peak * f


@triton.jit
def rounded_to_fp8(v, dtype: tl.constexpr):
    """Float32 of magnitude at most 240 in an fp8 of 3 mantissa bits, and what it then is in float32."""
    if INTERPRETED:  # whose conversion does not round
        bits = v.to(tl.int32, bitcast=True)
        normal = ((bits + 524287 + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
        magic = 1.5 * 2.0**14  # the last bit of a float32 of this size is 2^-9, the smallest fp8
        v = tl.where(tl.abs(v) < 2.0**-6, (v + magic) - magic, normal)
        return v.to(dtype), v
    code = v.to(dtype)
    return code, code.to(tl.float32)


@triton.jit
def quantise(
    source,
    codes,
    exists,
    f,
    total,
    peak,
    D,
    padded,
    QUANTISED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write rows in 8 bits, zeros in the padding. Returns three numbers a row, all as shares of its norm:

    how large the coded row is; how large the error of a product is (see ``product_error``); what became zero and should not.
    """
    good = is_finite(total) & (total > 0)
    limit = 127.0 if QUANTISED == INT8 else 224.0  # peak is below 2, and the fp8 of AMD ends at 240
    factor = tl.where(good, limit / peak if QUANTISED == INT8 else limit / 2, 0.0)
    square = tl.zeros([ROWS], tl.float32)
    fourth = tl.zeros([ROWS], tl.float32)
    lost = tl.zeros([ROWS], tl.float32)
    gone = tl.zeros([ROWS], tl.float32)
    for start in range(0, padded, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        v = widened(tl.load(source[:, None] + d[None, :], mask=(good & exists)[:, None] & (d < D)[None, :], other=0))
        v = v * f[:, None]
        u = v * factor[:, None]
        if QUANTISED == INT8:
            u = (u + 12582912.0) - 12582912.0  # to the nearest integer
            code = u.to(tl.int8)
            vanished = (u == 0) & (v != 0)
            lost += tl.sum(tl.where(vanished, v * v, 0.0), 1)
            gone += tl.sum(vanished.to(tl.float32), 1)
        else:
            code, u = rounded_to_fp8(u, codes.dtype.element_ty)
            v2 = v * v
            fourth += tl.sum(v2 * v2, 1)
        square += tl.sum(u * u, 1)
        tl.store(codes[:, None] + d[None, :], code, mask=exists[:, None] & (d < padded)[None, :])
    norm = tl.where(good, tl.sqrt(total), 1.0)
    size = tl.where(square > 0, tl.sqrt(square), 1.0) / norm
    # int8: of a value that lies anywhere between two integers
    error = peak / (127 * 3.4641016) if QUANTISED == INT8 else tl.sqrt(tl.sqrt(fourth))
    return size, tl.where(good, error / norm, 0.0), tl.sqrt(lost * gone / D) / norm


@triton.jit
def is_updated(references, image, K):
    """Whether an image has a reference, and so will be written."""
    found = 0
    for slot in range(K):
        found |= (tl.load(references + image * K + slot) >= 0).to(tl.int32)
    return found > 0


@triton.jit
def is_referenced(references, image, entries):
    found = 0
    for start in range(0, entries, 128):
        entry = start + tl.arange(0, 128)
        found |= tl.max((tl.load(references + entry, mask=entry < entries, other=-1) == image).to(tl.int32), 0)
    return found > 0


@triton.jit
def list_updated(order, references, B, K):
    """The images that have references, in order, then -1."""
    seen = 0
    for start in range(0, B, 128):
        b = start + tl.arange(0, 128)
        has = tl.zeros([128], tl.int32)
        for slot in range(K):
            has |= (tl.load(references + b * K + slot, mask=b < B, other=-1) >= 0).to(tl.int32)
        tl.store(order + seen + tl.cumsum(has, 0) - 1, b, mask=has > 0)
        seen += tl.sum(has, 0)
    for start in range(0, B, 128):
        b = start + tl.arange(0, 128)
        tl.store(order + b, -1, mask=(b >= seen) & (b < B))


NORMS_SIZES = [
    "key_b", "key_t", "bank_b", "bank_t", "query_b", "query_t", "mask_b", "mask_t", "B", "K", "T", "M", "D", "padded", "R",
]  # fmt: skip


@triton.jit(do_not_specialize=NORMS_SIZES)
def norms_kernel(
    keys,  # [R, M, D]: the bank, or for release matching the sources
    bank,
    queries,  # [B or R, T, D], read only if quantised
    references,  # [B, K]
    mask,  # [R, M]
    scale,  # out [R, M]: a power of two by which the row is multiplied first
    inverse,  # out [R, M]: 1 / max(norm, eps) of the scaled row, 0 if it must not be chosen
    weight,  # out [R, M]: 1 / max(norm, eps) of the row itself or of its code, or CAREFUL, or NaN: products with it win nothing
    snapshot,  # out [R, M, D]: rows that are read after they may have been overwritten
    moved,  # out [R]: images whose rows are to be read from the snapshot
    order,  # out [B]: see list_updated
    key_codes,  # out [R, M, padded]: rows in 8 bits, if quantised
    query_codes,  # out [B or R, T, padded], key_codes if the queries are the keys' tensor
    key_error,  # out [R, M]: see quantise
    query_error,  # out [B or R, T]
    query_weight,  # out [B or R, T]: as weight
    key_b,
    key_t,
    bank_b,
    bank_t,
    query_b,
    query_t,
    mask_b,
    mask_t,
    B,
    K,
    T,
    M,
    D,
    padded,
    R,
    RELEASE: tl.constexpr,
    MASKED: tl.constexpr,
    OVERWRITTEN: tl.constexpr,  # see launch.Overwritten: 1 and 2 copy rows to the snapshot, 3 matches none that would need it
    QUANTISED: tl.constexpr,
    OWN: tl.constexpr,  # queries and keys are images of one tensor
    VECTOR: tl.constexpr,  # strides and D count this many elements: divisibility without compiling for every size
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid ``(cdiv(M, ROWS), R)``; if quantised and not ``OWN``, ``(cdiv(max(M, T), ROWS), R + images of queries)``.

    Images that nothing refers to cost one look at the table.
    """
    image = tl.program_id(1)
    D = D * VECTOR
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row.to(tl.int64)
    if (tl.program_id(0) == 0) & (image == 0):
        list_updated(order, references, B, K)
    if image < R:
        updated = False
        if RELEASE | (OVERWRITTEN == 1) | (OVERWRITTEN == 3) | OWN:  # then R is B, else there may be no such row of the table
            updated = is_updated(references, image, K)
        referenced = is_referenced(references, image, B * K)
        used = updated if RELEASE else referenced
        both = used
        if (OVERWRITTEN == 1) | (OVERWRITTEN == 3):
            both = used & updated
        MOVES: tl.constexpr = (OVERWRITTEN == 1) | (OVERWRITTEN == 2)
        if MOVES:
            tl.store(moved + image, both.to(tl.int32))
        asks = False
        if (QUANTISED > 0) & OWN:
            asks = referenced if RELEASE else updated
        if used | asks:
            exists = row < M
            source = keys + image.to(tl.int64) * key_b * VECTOR + token * key_t * VECTOR
            f, total, peak = rows_squared(source, exists, D, ROWS, BLOCK_D)
            f = tl.where(total == 0, 1.0, f)  # zeros are in range
            eligible = is_finite(total)
            if RELEASE:  # the index chosen among sources is used to pick a reference token
                other = tl.maximum(tl.load(references + image * K), 0).to(tl.int64)
                partner = rows_squared(bank + other * bank_b * VECTOR + token * bank_t * VECTOR, exists, D, ROWS, BLOCK_D)
                eligible = eligible & is_finite(partner[1])
            elif MASKED:
                eligible = eligible & (tl.load(mask + image.to(tl.int64) * mask_b + token * mask_t, mask=exists, other=0) != 0)
            if OVERWRITTEN == 3:
                eligible = eligible & ~both
            out = image * M + row
            tl.store(scale + out, f, mask=exists)
            factor = tl.div_rn(1.0, scaled_norm(f, total))
            tl.store(inverse + out, tl.where(eligible, factor, 0.0), mask=exists)
            fits = in_range(f)
            plain = factor * f
            if QUANTISED > 0:
                codes = key_codes + (image.to(tl.int64) * M + token) * padded
                size, error, lost = quantise(source, codes, exists, f, total, peak, D, padded, QUANTISED, ROWS, BLOCK_D)
                fits = lost <= MOST_LOST
                plain = factor / size
                tl.store(key_error + out, tl.where(eligible, error, 0.0), mask=exists)
                if OWN:
                    tl.store(query_error + out, error, mask=exists)
                    tl.store(query_weight + out, tl.where(fits, plain, CAREFUL), mask=exists)
            tl.store(weight + out, tl.where(eligible, tl.where(fits, plain, CAREFUL), float("nan")), mask=exists)
            if MOVES and both:
                target = snapshot + (image.to(tl.int64) * M + token) * D
                for start in range(0, D, BLOCK_D):
                    d = start + tl.arange(0, BLOCK_D)
                    there = exists[:, None] & (d < D)[None, :]
                    tl.store(target[:, None] + d[None, :], tl.load(source[:, None] + d[None, :], mask=there), mask=there)
    elif QUANTISED > 0:
        image -= R
        asks = is_referenced(references, image, B * K) if RELEASE else is_updated(references, image, K)
        if asks:
            exists = row < T
            source = queries + image.to(tl.int64) * query_b * VECTOR + token * query_t * VECTOR
            f, total, peak = rows_squared(source, exists, D, ROWS, BLOCK_D)
            f = tl.where(total == 0, 1.0, f)
            codes = query_codes + (image.to(tl.int64) * T + token) * padded
            size, error, lost = quantise(source, codes, exists, f, total, peak, D, padded, QUANTISED, ROWS, BLOCK_D)
            out = image * T + row
            plain = 1.0 / scaled_norm(f, total) / size
            tl.store(query_error + out, error, mask=exists)
            tl.store(query_weight + out, tl.where(lost <= MOST_LOST, plain, CAREFUL), mask=exists)
