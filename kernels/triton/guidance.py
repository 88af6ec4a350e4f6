"""Guidance: a prediction pushed away from another, the evidence of a step, normalized attention guidance."""

from __future__ import annotations

import triton
import triton.language as tl
from negengine.kernels.triton.rows import narrowed, rounded_product, widened

# values of GUIDED: classifier-free guidance of neither prediction, of the base, of both
UNGUIDED, BASE, ALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

GUIDE_SIZES = ["conditional_b", "negative_b", "unconditional_b", "size", "n", "copies", "tiles"]
GUIDE_SMALL = ["strength", "guidance"]
EVIDENCE_SIZES = ["sample_b", "previous_b", "conditional_b", "negative_b", "unconditional_b", "size", "n", "tiles", "clip"]
EVIDENCE_SMALL = ["means", "guidance", "partial"]
NAG_SIZES = [
    "positive_b", "positive_t", "negative_b", "negative_t", "out_b", "out_t", "other_b", "other_t", "T", "D", "gain", "tau",
    "share", "rest",
]  # fmt: skip


@triton.jit
def row_of(tensor, stride, image, VECTOR: tl.constexpr):
    return tensor + image.to(tl.int64) * (tl.cast(stride, tl.int64) * VECTOR)


@triton.jit
def branches(conditional, negative, unconditional, guidance, at, there, GUIDED: tl.constexpr):
    """The base and the avoided prediction in float32, every product rounded as the other backends round it."""
    base = widened(tl.load(conditional + at, mask=there, other=0))
    avoided = widened(tl.load(negative + at, mask=there, other=0))
    if GUIDED > UNGUIDED:
        u, g = widened(tl.load(unconditional + at, mask=there, other=0)), tl.load(guidance).to(tl.float32)
        base = u + rounded_product(base - u, g)
        if GUIDED == ALL:
            avoided = u + rounded_product(avoided - u, g)
    return base, avoided


@triton.jit(do_not_specialize=GUIDE_SIZES, do_not_specialize_on_alignment=GUIDE_SMALL)
def guide_kernel(
    conditional,  # [n, size]
    negative,
    unconditional,
    strength,  # [n]
    guidance,  # [1]
    out,  # out [copies * n, size]
    conditional_b,
    negative_b,
    unconditional_b,
    size,
    n,
    copies,
    tiles,
    GUIDED: tl.constexpr,
    VECTOR: tl.constexpr,  # strides and size count this many elements
    BLOCK: tl.constexpr,
):
    """Grid ``(tiles * n,)``, ``tiles`` of BLOCK elements each."""
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    size = tl.cast(size, tl.int64) * VECTOR
    at = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    base, avoided = branches(
        row_of(conditional, conditional_b, image, VECTOR), row_of(negative, negative_b, image, VECTOR),
        row_of(unconditional, unconditional_b, image, VECTOR), guidance, at, there, GUIDED,
    )  # fmt: skip
    y = narrowed(base + rounded_product(base - avoided, tl.load(strength + image).to(tl.float32)), out.dtype.element_ty)
    for copy in range(0, copies):
        tl.store(out + (copy * n + image).to(tl.int64) * size + at, y, mask=there)


@triton.jit
def clamped(v, clip, CLIPPED: tl.constexpr):
    """A NaN stays one, which minima and maxima would take for a missing value."""
    if CLIPPED:
        v = tl.where(v > clip, clip, v)
        v = tl.where(v < -clip, -clip, v)
    return v


@triton.jit(do_not_specialize=EVIDENCE_SIZES, do_not_specialize_on_alignment=EVIDENCE_SMALL)
def evidence_kernel(
    sample,  # [n, size]
    previous,
    conditional,
    negative,
    unconditional,
    means,  # [4] float64
    guidance,  # [1]
    partial,  # out [3, n, tiles] float32
    sample_b,
    previous_b,
    conditional_b,
    negative_b,
    unconditional_b,
    size,
    n,
    tiles,
    clip,
    GUIDED: tl.constexpr,
    CLIPPED: tl.constexpr,
    VECTOR: tl.constexpr,  # strides and size count this many elements
    BLOCK: tl.constexpr,
):
    """Grid ``(tiles * n,)``. Each program leaves three sums over its BLOCK elements, so that their order is always the same."""
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    size = tl.cast(size, tl.int64) * VECTOR
    at = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    base, avoided = branches(
        row_of(conditional, conditional_b, image, VECTOR), row_of(negative, negative_b, image, VECTOR),
        row_of(unconditional, unconditional_b, image, VECTOR), guidance, at, there, GUIDED,
    )  # fmt: skip
    x = widened(tl.load(row_of(sample, sample_b, image, VECTOR) + at, mask=there, other=0))
    y = widened(tl.load(row_of(previous, previous_b, image, VECTOR) + at, mask=there, other=0))
    m0, m1 = tl.load(means).to(tl.float32), tl.load(means + 1).to(tl.float32)
    m2, m3 = tl.load(means + 2).to(tl.float32), tl.load(means + 3).to(tl.float32)
    x0_base, x0_avoided = clamped(m0 * x + m1 * base, clip, CLIPPED), clamped(m0 * x + m1 * avoided, clip, CLIPPED)
    d_base, d_avoided = y - (m2 * x0_base + m3 * x), y - (m2 * x0_avoided + m3 * x)
    out, row = partial + image.to(tl.int64) * tiles + tile, tl.cast(n, tl.int64) * tiles
    tl.store(out, tl.sum(m2 * (x0_base - x0_avoided) * (d_avoided + d_base), 0))
    tl.store(out + row, tl.sum(d_avoided * d_avoided, 0))
    tl.store(out + 2 * row, tl.sum(d_base * d_base, 0))


@triton.jit
def token(positive, negative, d, D):
    """Channels of both streams, in float32."""
    there = d < D
    return widened(tl.load(positive + d, mask=there, other=0)), widened(tl.load(negative + d, mask=there, other=0))


@triton.jit
def shares(most, size, gain, tau, share, rest):
    """What ``z`` and ``z - away`` are multiplied by: so the extrapolation is not rounded again on its way through factor and blend.

    The extrapolation is held to ``tau`` times the norm of ``z``, and stays as it is where it is nothing.
    """
    ratio = tl.where(size == 0, 1.0, tl.div_rn(most * tau, size))
    held = tl.where(ratio > 1, 1.0, ratio) * share
    return held + rest, held * gain


@triton.jit
def blend(z, away, own, apart, out, other, d, D, BOTH: tl.constexpr):
    y = narrowed(own * z + apart * (z - away), out.dtype.element_ty)
    tl.store(out + d, y, mask=d < D)
    if BOTH:
        tl.store(other + d, y, mask=d < D)


@triton.jit(do_not_specialize=NAG_SIZES)
def nag_kernel(
    positive,  # [B, T, D]
    negative,
    out,  # out [B, T, D], may be positive
    other,  # out [B, T, D], may be negative, if BOTH
    positive_b,
    positive_t,
    negative_b,
    negative_t,
    out_b,
    out_t,
    other_b,
    other_t,
    T,
    D,
    gain,  # scale - 1
    tau,
    share,  # alpha
    rest,  # 1 - alpha
    BOTH: tl.constexpr,
    WHOLE: tl.constexpr,  # a token fits BLOCK_D channels, and is read once
    VECTOR: tl.constexpr,  # strides and D count this many elements
    BLOCK_D: tl.constexpr,
):
    """Grid ``(B * T,)``: a program reads all of a token's channels before it writes any of those that it reads again."""
    image, row = tl.program_id(0) // T, tl.program_id(0) % T
    D = D * VECTOR
    z_at = row_of(row_of(positive, positive_b, image, VECTOR), positive_t, row, VECTOR)
    away_at = row_of(row_of(negative, negative_b, image, VECTOR), negative_t, row, VECTOR)
    out_at = row_of(row_of(out, out_b, image, VECTOR), out_t, row, VECTOR)
    other_at = row_of(row_of(other, other_b, image, VECTOR), other_t, row, VECTOR)
    if WHOLE:
        d = tl.arange(0, BLOCK_D)
        z, away = token(z_at, away_at, d, D)
        own, apart = shares(tl.sum(tl.abs(z), 0), tl.sum(tl.abs(z + gain * (z - away)), 0), gain, tau, share, rest)
        blend(z, away, own, apart, out_at, other_at, d, D, BOTH)
    else:
        most, size = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            z, away = token(z_at, away_at, start + tl.arange(0, BLOCK_D), D)
            most += tl.abs(z)
            size += tl.abs(z + gain * (z - away))
        own, apart = shares(tl.sum(most, 0), tl.sum(size, 0), gain, tau, share, rest)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            z, away = token(z_at, away_at, d, D)
            blend(z, away, own, apart, out_at, other_at, d, D, BOTH)
