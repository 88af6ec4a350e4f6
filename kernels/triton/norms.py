"""Norms of the rows that a search may choose, and the arithmetic on rows that the other kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
CAREFUL = tl.constexpr(float("inf"))  # a weight: the magnitude needs the careful search of the merge kernel


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
def multiply(a, b, product):
    """``product + a @ b``, accumulated in float32."""
    if INTERPRETED and a.dtype == tl.bfloat16:  # of which the interpreter would multiply the bit patterns
        return tl.dot(widened(a), widened(b), product, input_precision="ieee")
    return tl.dot(a, b, product, input_precision="ieee")


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
    return tl.maximum(tl.sqrt_rn(total), EPS * f)


@triton.jit
def rows_squared(pointers, exists, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Scale and scaled sum of squares of rows; the sum is not finite if, and only if, the row is not.

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
    return f, total


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


@triton.jit(do_not_specialize=["key_b", "key_t", "bank_b", "bank_t", "mask_b", "mask_t", "B", "K", "M", "D"])
def norms_kernel(
    keys,  # [R, M, D]: the bank, or for release matching the sources
    bank,
    references,  # [B, K]
    mask,  # [R, M]
    scale,  # out [R, M]: a power of two by which the row is multiplied first
    inverse,  # out [R, M]: 1 / max(norm, eps) of the scaled row, 0 if it must not be chosen
    weight,  # out [R, M]: 1 / max(norm, eps) of the row itself, or CAREFUL, or NaN: products with it win nothing
    snapshot,  # out [R, M, D]: rows that are read after they may have been overwritten
    moved,  # out [R]: images whose rows are to be read from the snapshot
    key_b,
    key_t,
    bank_b,
    bank_t,
    mask_b,
    mask_t,
    B,
    K,
    M,
    D,
    RELEASE: tl.constexpr,
    MASKED: tl.constexpr,
    OVERWRITTEN: tl.constexpr,  # see launch.Overwritten: 1 and 2 copy rows to the snapshot, 3 matches none that would need it
    VECTOR: tl.constexpr,  # strides and D count this many elements: divisibility without compiling for every size
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid ``(cdiv(M, ROWS), R)``. Images that nothing refers to cost one look at the table."""
    image = tl.program_id(1)
    used = is_updated(references, image, K) if RELEASE else is_referenced(references, image, B * K)
    both = used
    if (OVERWRITTEN == 1) | (OVERWRITTEN == 3):
        both = used & is_updated(references, image, K)
    MOVES: tl.constexpr = (OVERWRITTEN == 1) | (OVERWRITTEN == 2)
    if MOVES:
        tl.store(moved + image, both.to(tl.int32))
    if used:
        D = D * VECTOR
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        exists = row < M
        token = row.to(tl.int64)
        source = keys + image.to(tl.int64) * key_b * VECTOR + token * key_t * VECTOR
        f, total = rows_squared(source, exists, D, ROWS, BLOCK_D)
        f = tl.where(total == 0, 1.0, f)  # zeros are in range
        eligible = is_finite(total)
        if RELEASE:  # the index chosen among sources is used to pick a reference token
            other = tl.load(references + image * K).to(tl.int64)
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
        tl.store(weight + out, tl.where(eligible, tl.where(in_range(f), factor * f, CAREFUL), float("nan")), mask=exists)
        if MOVES and both:
            target = snapshot + (image.to(tl.int64) * M + token) * D
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                there = exists[:, None] & (d < D)[None, :]
                tl.store(target[:, None] + d[None, :], tl.load(source[:, None] + d[None, :], mask=there), mask=there)
