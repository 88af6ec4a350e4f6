"""Rows in 8 bits, and how far a product of two such rows may be off."""

from __future__ import annotations

import triton
import triton.language as tl
from negengine.kernels.triton.rows import INT8, INTERPRETED, is_finite, widened

MOST_LOST = tl.constexpr(0.01)  # of a row's norm: what an int8 code may lose of channels that become zero
FP8_ERROR = tl.constexpr(0.037)  # standard deviation of the relative error of a product of two values with 3 mantissa bits
FP8_SUMS = tl.constexpr(2.0**-13)  # by how much sums with 13 fraction bits are off, in deviations: four additions per partial sum


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
    """Write rows in 8 bits, zeros in the padding. Returns three numbers per row, all as shares of its norm:

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
def product_error(query_error, key_error, QUANTISED: tl.constexpr):
    """Bound on the standard deviation of an approximate cosine, from what ``quantise`` says of the two rows.

    int8: errors are as large in every channel. fp8: they are in proportion to the value, so large channels that the two rows
    share count most; by Cauchy and Schwarz their fourth powers bound it, however the channels are spread.
    """
    if QUANTISED == INT8:
        return tl.sqrt(query_error * query_error + key_error * key_error)
    else:
        return FP8_ERROR * query_error * key_error + FP8_SUMS
