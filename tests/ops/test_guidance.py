"""Every usable backend keeps the contract of guidance: no element worse than torch in the same dtype by over one step."""

from __future__ import annotations

import pytest
import torch
from contract import same_bits
from examples import Draw, examples
from guidance_cases import CASES, KINDS, LAYOUTS, MEANS, SHAPES, Case, check, double, inputs, laid_out, means_on, values

from negengine import ops
from negengine.ops import registry
from negengine.reference import guidance as reference

WIDTHS = (1, 3, 8, 15, 16, 17, 64, 256, 257, 640, 1000)


# --- guide -------------------------------------------------------------------------------------------------------


@CASES
@examples
def test_guide(case: Case, draw: Draw):
    shape, copies = (draw.integer(1, 4), *draw.one_of(SHAPES)), draw.integer(1, 3)
    given = inputs(case, draw, shape)
    before = [t.clone() for t in (given.conditional, given.negative)]
    y = ops.guide(given.conditional, given.negative, given.strength, *given.cfg, copies, backend=case.backend)
    assert y.shape == (copies * shape[0], *shape[1:])
    assert y.dtype == case.dtype
    assert y.is_contiguous()
    assert all(same_bits(a, b) for a, b in zip(before, (given.conditional, given.negative), strict=True))
    assert all(same_bits(part, y[: shape[0]]) for part in y.chunk(copies))
    exact = reference.guide(*double(given.conditional, given.negative, given.strength, *given.cfg))
    same = reference.guide(given.conditional, given.negative, given.strength, *given.cfg)
    check(y[: shape[0]], exact, same)


@CASES
def test_guide_has_the_bits_of_the_rule_in_float32(case):
    """Rounded once from it: the same in every backend and with every instruction set."""
    c, n, u = (values("normal", (3, 4, 20, 21), seed, case.dtype, case.device) for seed in range(3))
    strength, g = torch.tensor([0.3, 0.0, 12.7], device=case.device), torch.tensor([7.3], device=case.device)
    wide = torch.promote_types(case.dtype, torch.float32)
    expected = reference.guide(*(t.to(wide) for t in (c, n, strength, u, g)), True).to(case.dtype)
    assert same_bits(ops.guide(c, n, strength, u, g, True, backend=case.backend), expected)
    still = ops.guide(c, c, strength, backend=case.backend)
    assert same_bits(still, c), "a prediction that equals the avoided one stays as it is"


@CASES
def test_a_nan_stays_where_it_is(case):
    c, n, u = (values("normal", (3, 130), seed, case.dtype, case.device) for seed in range(3))
    ones = torch.ones(3, device=case.device)
    clean = ops.guide(c, n, ones, u, ones[:1], backend=case.backend)
    sums = ops.evidence(c, n, c, n, means_on(case), u, ones[:1], backend=case.backend)
    sick = n.clone()
    sick[1, 7] = torch.nan
    y = ops.guide(c, sick, ones, u, ones[:1], backend=case.backend)
    assert y[1, 7].isnan()
    y[1, 7] = clean[1, 7]
    assert same_bits(y, clean)
    for clip in (None, 1.0):
        found = ops.evidence(c, n, c, sick, means_on(case), u, ones[:1], clip=clip, backend=case.backend)
        assert found.isnan().tolist() == [False, True, False]
        if clip is None:
            assert same_bits(found[::2], sums[::2])


# --- evidence ----------------------------------------------------------------------------------------------------


def rounding(sample, previous, conditional, negative, means, unconditional, guidance, guide_negative, clip):
    """Of every element of float64 inputs: by how much float32 arithmetic as written may be off, to first order, in steps."""
    m, (e, a) = means.abs(), reference.branches(conditional, negative, unconditional, guidance, guide_negative)
    u = torch.zeros_like(e) if unconditional is None else unconditional
    g = torch.zeros(1, dtype=torch.float64) if guidance is None else guidance.abs()
    size = [2 * u.abs() + g * (p.abs() + u.abs()) + p.abs() + q.abs() for p, q in ((conditional, e), (negative, a))]
    x0 = [m[0] * sample.abs() + m[1] * s for s in size]  # of the terms, which clipping hides at most
    d = [previous.abs() + m[2] * x + m[3] * sample.abs() for x in x0]
    terms = reference.squares(sample, previous, conditional, negative, means, unconditional, guidance, guide_negative, clip)
    factor = terms[1].sqrt() + terms[2].sqrt()
    apart = (x0[0] + x0[1]) * m[2]
    difference = apart * factor + (d[0] + d[1]) * torch.minimum(apart, factor)
    return torch.stack([difference, d[1] * terms[1].sqrt(), d[0] * terms[2].sqrt()])


@CASES
@examples
def test_evidence(case: Case, draw: Draw):
    shape = (draw.integer(1, 4), *draw.one_of(SHAPES))
    given = inputs(case, draw, shape)
    means, clip = means_on(case, draw.integer(0, len(MEANS) - 1)), draw.one_of((None, 1.0, 0.1))
    takes = registry._BACKENDS[case.backend].guidance.refuses
    others = [d for d in (case.dtype, torch.float32, torch.float16) if takes(torch.device(case.device), d) is None]

    def one() -> torch.Tensor:
        return laid_out(values(draw.one_of(KINDS), shape, draw.seed(), draw.one_of(others), case.device), draw.one_of(LAYOUTS))

    sample, previous = one(), one()
    arguments = (sample, previous, given.conditional, given.negative, means, *given.cfg, clip)
    found = ops.evidence(*arguments, backend=case.backend)
    both = ops.distances(*arguments, backend=case.backend)
    assert found.dtype == both.dtype == torch.float64
    assert found.shape == shape[:1]
    assert both.shape == (2, shape[0])
    wide = double(*arguments)
    exact = reference.squares(*wide).flatten(2)
    precision = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps
    bound = 3 * precision * (rounding(*wide).flatten(2) + exact.abs()).sum(2) + 1e-44 * shape[0]
    error = (torch.stack([found, *both]).cpu() - exact.sum(2)).abs()
    overflow = exact.abs().amax() > 1e36  # squares of large means leave float32
    assert overflow or (error <= bound).all(), (error / bound).max()


@CASES
def test_evidence_does_not_cancel(case):
    """Between almost equal predictions, of samples that are large: the difference of two float32 distances would keep no digit."""
    if case.dtype != torch.float32:
        pytest.skip("predictions as close as this need float32")
    g = torch.Generator().manual_seed(0)
    x, y, c, n = (torch.randn(2, 4000, generator=g, dtype=torch.float64) for _ in range(4))
    x, y, n = 100 * x, 100 * y, c + 1e-3 * n
    means = torch.tensor([0.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    arguments = [t.float().to(case.device) for t in (x, y, c, n)]
    found = ops.evidence(*arguments, means.to(case.device), backend=case.backend).cpu()
    exact = reference.evidence(*double(*arguments), means)
    naive = reference.distances(*(t.cpu() for t in arguments), means.float()).double()
    scale = reference.squares(*double(*arguments), means)[0].abs().sum(1)
    assert ((found - exact).abs() <= 2e-4 * scale / 4000**0.5).all()
    assert ((naive[0] - naive[1] - exact).abs() > 2e-2 * scale / 4000**0.5).any(), "the test is too easy"


@CASES
def test_the_same_bits_from_run_to_run_and_with_any_number_of_threads(case):
    size, T = ((4, 30, 25), 10) if case.backend == "triton" and case.device == "cpu" else ((4, 120, 100), 100)
    c, m, x, y = (values("normal", (3, *size), seed, case.dtype, case.device) for seed in range(4))
    a, b = (values("normal", (2, T, 640), seed, case.dtype, case.device) for seed in (1, 2))
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4, 1):
            torch.set_num_threads(count)
            sums = torch.ops.negengine.evidence(x, y, c, m, means_on(case), None, None, False, None, case.backend)
            alone = ops.evidence(x[1:2], y[1:2], c[1:2], m[1:2], means_on(case), backend=case.backend)
            assert same_bits(alone, sums[0, 1:2]), "an image depends on the rest of the batch"
            results.append((sums, ops.nag(a, b, 5.0, 2.5, 0.25, case.backend)))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(p, q) for other in results[1:] for p, q in zip(results[0], other, strict=True))


# --- nag ---------------------------------------------------------------------------------------------------------


def streams(draw: Draw, B: int, T: int, D: int, case: Case, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    z, away = (values(draw.one_of(KINDS), (B, T, D), draw.seed(), case.dtype, case.device) for _ in "+-")
    if draw.flag():
        away = z.clone()
    if layout == "text before":
        z, away = (torch.cat([t.new_full((B, 5, D), torch.nan), t], 1)[:, 5:] for t in (z, away))
    elif layout == "halves":
        z, away = torch.cat([z, away]).chunk(2)
    elif layout == "images inside":
        z, away = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (z, away))
    elif layout == "channels apart":
        z, away = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (z, away))
    return z, away


STREAMS = ("plain", "text before", "halves", "images inside", "channels apart")


def check_nag(y, z, away, scale, tau, alpha):
    wide = double(z, away)
    exact, same = reference.nag(*wide, scale, tau, alpha), reference.nag(z, away, scale, tau, alpha)
    p, q = wide
    factor = reference.nag(*wide, scale, tau, 1.0).abs().sum(-1, keepdim=True)
    whole = (p + (scale - 1) * (p - q)).abs().sum(-1, keepdim=True)
    factor = torch.where(whole == 0, 1.0, factor / whole)
    gain = abs(scale - 1)
    terms = [abs(alpha) * factor * p.abs(), abs(alpha) * factor * gain * (p.abs() + q.abs()), abs(1 - alpha) * p.abs()]
    check(y, exact, same, torch.stack(terms).amax(0))


@CASES
@examples
def test_nag(case: Case, draw: Draw):
    B, T, D = draw.integer(1, 3), draw.integer(1, 9), draw.one_of(WIDTHS)
    z, away = streams(draw, B, T, D, case, draw.one_of(STREAMS))
    numbers = draw.one_of((5.0, 1.0, 0.0, 100.0)), draw.one_of((2.5, 0.0, 1e4)), draw.one_of((0.25, 0.0, 1.0, -0.5))
    before = z.clone()
    y = ops.nag(z, away, *numbers, backend=case.backend)
    assert y.shape == z.shape
    assert y.is_contiguous()
    assert same_bits(z, before)
    check_nag(y, z, away, *numbers)


@CASES
@pytest.mark.parametrize("layout", STREAMS)
@pytest.mark.parametrize("both", [False, True])
def test_nag_in_place(case, layout, both):
    """The bits of the other form, nothing written beside them."""
    z, away = streams(Draw(0), 2, 6, 40, case, layout)
    y, before = ops.nag(z, away, 5.0, 2.5, 0.25, backend=case.backend), away.clone()
    assert ops.nag_(z, away, 5.0, 2.5, 0.25, both=both, backend=case.backend) is z
    assert same_bits(z, y)
    assert same_bits(away, y if both else before)
    if layout == "text before":
        assert z.untyped_storage().nbytes() == 2 * 11 * 40 * z.itemsize
        assert z.as_strided((2, 5, 40), z.stride(), 0).isnan().all()


@CASES
@pytest.mark.parametrize("D", [4096, 5000])
def test_nag_of_wide_tokens(case, D):
    z, away = (values("outlier", (1, 3, D), seed, case.dtype, case.device) for seed in (1, 2))
    check_nag(ops.nag(z, away, 5.0, 2.5, 0.25, backend=case.backend), z, away, 5.0, 2.5, 0.25)


@CASES
def test_tokens_do_not_depend_on_each_other(case):
    z, away = (values("normal", (1, 5, 72), seed, case.dtype, case.device) for seed in (1, 2))
    z[0, 1] = away[0, 1] = 0  # no norm to hold it to
    sick = z.clone()
    sick[0, 3, 4] = torch.nan
    y, clean = (ops.nag(t, away, 5.0, 2.5, 0.25, backend=case.backend) for t in (sick, z))
    assert (y[0, 1] == 0).all()
    assert y[0, 3].isnan().all()
    assert same_bits(y[0, [0, 1, 2, 4]], clean[0, [0, 1, 2, 4]])
