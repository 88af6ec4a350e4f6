"""Arithmetic on rows of channels that the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
INT8, FP8 = tl.constexpr(1), tl.constexpr(2)  # values of QUANTISED; 0: the search reads the rows themselves
LARGEST = tl.constexpr(2.0**48)  # norm up to which products of rows stay far inside float32
NEVER = tl.constexpr(2143289344)  # bits of the weight of a key that must not be chosen: a NaN, so its scores win nothing
APART = tl.constexpr(2143289345)  # the same of a key that the fast search leaves to the exact one: another NaN


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
    if PARTIAL and not INTERPRETED:
        return product + tl.dot(a, b, max_num_imprecise_acc=a.shape[1])  # with a limit the compiler does not fuse the addition
    if INTERPRETED and product.dtype == tl.float32:
        # the interpreter multiplies the bit patterns of bfloat16, and on some processors equal columns get unequal products
        return product + tl.sum(widened(a)[:, :, None] * widened(b)[None, :, :], 1)
    return tl.dot(a, b, product, input_precision="ieee", out_dtype=product.dtype)


@triton.jit
def rounded_product(a, b):
    """``a * b``, rounded: of a plain product the compiler would round only what is later added to it or subtracted from it."""
    return tl.fma(a, b, 0.0)


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
    return tl.where(total == 0, 1.0, f), total, peak * f


@triton.jit
def rows_of(tensor, stride_b, stride_t, snapshot, moved, image, token, M, D, MOVES: tl.constexpr):
    """Pointers to rows, one image and token each; where MOVES, to their copies if they may have been overwritten."""
    image, token = image.to(tl.int64), token.to(tl.int64)
    rows = tensor + image * stride_b + token * stride_t
    if MOVES:
        rows = tl.where(tl.load(moved + image) > 0, snapshot + (image * M + token) * D, rows)
    return rows
