"""Every usable backend keeps the contract of guidance: no element worse than torch in the same dtype by over one step."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from contract import DEVICES, DTYPES, same_bits, ulp
from examples import Draw, examples

from negengine import ops
from negengine.ops import registry
from negengine.reference import guidance as reference

KINDS = ("normal", "large", "tiny", "zeros", "outlier", "equal")
SHAPES = ((1,), (7,), (16,), (3, 5, 7), (4, 8, 8), (2048,), (2065,), (4, 33, 31))
WIDTHS = (1, 3, 8, 15, 16, 17, 64, 256, 257, 640, 1000)
LAYOUTS = ("plain", "rows of a batch", "every other row", "channels last", "strided", "expanded")
MEANS = [reference.means_of(0.9, 0.95), reference.means_of(0.005, 0.02), (0.0, 0.0, 0.0, 1.0), reference.means_of(0.99, 1 - 1e-6)]


@dataclass(frozen=True)
class Case:
    backend: str
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}-{str(self.dtype).removeprefix('torch.')}"


def cases() -> list[Case]:
    found = []
    for name, missing in ops.backends().items():
        offered = registry._BACKENDS[name].guidance
        for device in DEVICES if missing is None and offered is not None else ():
            found += [Case(name, device, dtype) for dtype in DTYPES if offered.refuses(torch.device(device), dtype) is None]
    return found


CASES = pytest.mark.parametrize("case", cases(), ids=str)


# --- data and oracle ---------------------------------------------------------------------------------------------


def values(kind: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "large":
        x *= 1e3
    elif kind == "tiny":
        x *= 1e-3 if dtype == torch.float16 else 1e-20
    elif kind == "zeros":
        x[torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.5] = 0
    elif kind == "outlier":
        x[..., :: max(1, shape[-1] // 3)] *= 300
    return x.to(device, dtype)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``x`` (of its first row only for ``expanded``) with other strides."""
    nan = torch.full_like(x, torch.nan)
    if layout == "rows of a batch":
        return torch.cat([nan, x, nan])[len(x) : 2 * len(x)]
    if layout == "every other row":
        return torch.stack([nan, x], 1).flatten(0, 1)[1::2]
    if layout == "channels last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([x, nan], -1)[..., 0]
    return x[:1].expand_as(x) if layout == "expanded" else x


def check(y: torch.Tensor, exact: torch.Tensor, same: torch.Tensor, largest: torch.Tensor | None = None) -> None:
    """``|y - exact|`` is at most that of torch in the same dtype and one step of the result, and no larger on average.

    Args:
        largest: the largest of the terms of which the result is made, where sums of many may be rounded in another order: torch may
            then be right by luck where this is four steps of the arithmetic's dtype off, of the size of that term.
    """
    y, exact, same, dtype = y.cpu(), exact.cpu(), same.cpu(), y.dtype
    rounded = exact.to(dtype)
    assert y[rounded.abs() < torch.finfo(dtype).max].isfinite().all(), "overflow of what is no overflow"
    step = ulp(exact, dtype)
    if largest is not None:
        step = step + 4 * ulp(largest.cpu(), torch.promote_types(dtype, torch.float32))
    theirs = (same.double() - exact).abs().nan_to_num(torch.inf, torch.inf)
    ours = (y.double() - exact).abs()
    wrong = ~((ours <= theirs + step) | (y == rounded))
    assert not wrong.any(), f"{(ours - theirs)[wrong].max()} more than torch, where a step is {step[wrong].max()}"
    finite = rounded.isfinite()
    if finite.sum() >= 1000:
        on_average, torch_s = ((e[finite] / step[finite]).clamp_max(4).mean() for e in (ours, theirs))
        most = max(1.05 * torch_s.item() + 1e-3, 0.25)  # a quarter of a step is what a single rounding leaves
        assert on_average <= most, f"{on_average:.3f} steps wrong on average, torch {torch_s:.3f}"


def double(*tensors):
    return [t.double().cpu() if isinstance(t, torch.Tensor) else t for t in tensors]


@dataclass(frozen=True)
class Inputs:
    conditional: torch.Tensor
    negative: torch.Tensor
    strength: torch.Tensor
    unconditional: torch.Tensor | None
    guidance: torch.Tensor | None
    guide_negative: bool

    @property
    def cfg(self):
        return self.unconditional, self.guidance, self.guide_negative


def inputs(case: Case, draw: Draw, shape: tuple[int, ...]) -> Inputs:
    def one() -> torch.Tensor:
        return laid_out(values(draw.one_of(KINDS), shape, draw.seed(), case.dtype, case.device), draw.one_of(LAYOUTS))

    conditional, negative, unconditional = one(), one(), one()
    if draw.one_of(KINDS) == "equal":
        negative = conditional
    numbers = {"device": case.device, "dtype": draw.one_of((torch.float32, torch.float64))}
    strength = torch.tensor([draw.one_of((0.0, 0.3, 1.0, 17.7, 1e4)) for _ in range(shape[0])], **numbers)
    guidance = torch.tensor([draw.one_of((7.5, 1.0, 0.0, 1e3))], **numbers)
    if draw.flag():
        return Inputs(conditional, negative, strength, None, None, draw.flag())
    return Inputs(conditional, negative, strength, unconditional, guidance, draw.flag())


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


def means_on(case: Case, number: int = 0) -> torch.Tensor:
    return torch.tensor(MEANS[number], dtype=torch.float64, device=case.device)


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


# --- empty calls, and those that cannot be taken -----------------------------------------------------------------


@CASES
def test_empty_calls(case):
    kind = {"dtype": case.dtype, "device": case.device}
    for shape in ((0, 4, 8), (2, 0, 8)):
        x, strength = torch.empty(shape, **kind), torch.ones(shape[0], device=case.device)
        assert ops.guide(x, x, strength, copies=2, backend=case.backend).shape == (2 * shape[0], *shape[1:])
        assert ops.evidence(x, x, x, x, means_on(case), backend=case.backend).tolist() == [0.0] * shape[0]
        assert ops.distances(x, x, x, x, means_on(case), backend=case.backend).shape == (2, shape[0])
        assert ops.nag(x, x, 5.0, 2.5, 0.25, backend=case.backend).shape == shape
        ops.nag_(x, x.clone(), 5.0, 2.5, 0.25, both=True, backend=case.backend)


X, ONE = torch.randn(2, 4, 8), torch.ones(1)


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, r"negative must have the shape of conditional, \[2, 4, 8\], got \[2, 4\]", {"negative": X[..., 0]}),
        (TypeError, "negative is torch.float16, conditional is torch.float32; they must agree", {"negative": X.half()}),
        (TypeError, "conditional must be a floating-point tensor, got torch.int64", {"conditional": X.long()}),
        (ValueError, r"predictions must have shape \[n, ...\], got \[4\]", {"conditional": X[0, :, 0]}),
        (ValueError, r"strength must have shape \[2\], got \[1\]", {"strength": ONE}),
        (TypeError, "strength must be float32 or float64, got torch.float16", {"strength": torch.ones(2).half()}),
        (ValueError, "needs both unconditional and guidance", {"unconditional": X}),
        (ValueError, "needs both unconditional and guidance", {"guidance": ONE}),
        (ValueError, r"guidance must have shape \[1\]", {"unconditional": X, "guidance": torch.ones(2)}),
        (ValueError, "copies must be 1 or more, got 0", {"copies": 0}),
        (ValueError, "unknown backend 'x'; there are", {"backend": "x"}),
        (TypeError, "negative is on meta, conditional on cpu", {"negative": X.to("meta")}),
        (RuntimeError, "not differentiable", {"negative": X.clone().requires_grad_()}),
    ],
)
def test_what_guide_refuses(error, message, arguments):
    with pytest.raises(error, match=message):
        ops.guide(**{"conditional": X, "negative": X, "strength": torch.ones(2)} | arguments)


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, "previous must have the shape of conditional", {"previous": X[:1]}),
        (TypeError, "sample must be a floating-point tensor", {"sample": X.int()}),
        (TypeError, "means must be float64, got torch.float32", {"means": torch.ones(4)}),
        (ValueError, r"means must have shape \[4\], got \[3\]", {"means": torch.ones(3).double()}),
        (ValueError, "clip must be positive, got 0", {"clip": 0.0}),
        (ValueError, "clip must be positive, got nan", {"clip": float("nan")}),
    ],
)
def test_what_evidence_refuses(error, message, arguments):
    usual = {"sample": X, "previous": X, "conditional": X, "negative": X, "means": torch.ones(4).double()}
    for function in (ops.evidence, ops.distances):
        with pytest.raises(error, match=message):
            function(**usual | arguments)


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, r"positive must have shape \[B, T, D\], got \[2, 4\]", {"positive": X[..., 0]}),
        (ValueError, "negative must have the shape of positive", {"negative": X[:1]}),
        (TypeError, "positive must be a floating-point tensor", {"positive": X.int(), "negative": X.int()}),
        (ValueError, "tau bounds a ratio of norms and must not be negative, got -1", {"tau": -1.0}),
        (ValueError, "scale must be finite, got inf", {"scale": float("inf")}),
        (ValueError, "unknown backend 'x'", {"backend": "x"}),
    ],
)
def test_what_nag_refuses(error, message, arguments):
    usual = {"positive": X, "negative": X, "scale": 5.0, "tau": 2.5, "alpha": 0.25}
    for function in (ops.nag, ops.nag_):
        with pytest.raises(error, match=message):
            function(**usual | arguments)


def test_expanded_tensors_are_not_overwritten():
    z = torch.randn(1, 4, 8).expand(3, 4, 8)
    with pytest.raises(ValueError, match="positive repeats the same memory"):
        ops.nag_(z, z.clone(), 5.0, 2.5, 0.25)
    with pytest.raises(ValueError, match="negative repeats the same memory"):
        ops.nag_(z.clone(), z, 5.0, 2.5, 0.25, both=True)
    assert ops.nag_(z.clone(), z, 5.0, 2.5, 0.25).shape == z.shape


def test_a_backend_that_is_asked_for_and_missing_says_why(monkeypatch):
    for name, backend in list(registry._BACKENDS.items()):
        if name != "torch":
            changed = {"missing": lambda: "needs a device of 2031"}
            monkeypatch.setitem(registry._BACKENDS, name, type(backend)(**vars(backend) | changed))
            with pytest.raises(RuntimeError, match=f"{name}: needs a device of 2031"):
                ops.guide(X, X, torch.ones(2), backend=name)
    assert same_bits(ops.guide(X, X, torch.ones(2)), X)
    without = type(registry._BACKENDS["torch"])(**vars(registry._BACKENDS["torch"]) | {"guidance": None})
    monkeypatch.setitem(registry._BACKENDS, "torch", without)
    with pytest.raises(RuntimeError, match="torch: has no operators of guidance"):
        ops.nag(X, X, 5.0, 2.5, 0.25)


def test_on_cpus_the_native_kernels_are_chosen_where_they_can():
    cpu = registry._BACKENDS["cpu"]
    if cpu.missing() is not None:
        pytest.skip(cpu.missing())
    device = torch.device("cpu")
    assert registry.choose_guidance(None, device, torch.bfloat16, torch.float32) is cpu.guidance
    assert registry.choose_guidance(None, device, torch.float32, torch.float64) is registry._BACKENDS["torch"].guidance
    with pytest.raises(RuntimeError, match="cpu: takes float32, bfloat16 and float16, not float64"):
        ops.guide(X.double(), X.double(), torch.ones(2), backend="cpu")


# --- torch.library -----------------------------------------------------------------------------------------------


def opchecks():
    """Of every backend one, and one that is not contiguous; the others with all tests."""
    for case in cases():
        for layout in ("plain", "rows of a batch", "strided") if case.dtype in (torch.float32, torch.bfloat16) else ():
            guards = case.dtype == torch.float32 and (layout == "plain" or (layout == "strided" and case.backend != "torch"))
            yield pytest.param(case, layout, marks=() if guards else pytest.mark.exhaustive, id=f"{case}-{layout}")


@pytest.mark.parametrize("case, layout", [*opchecks()])
def test_opcheck(case, layout):
    c, n, u, x = (laid_out(values("normal", (2, 3, 5), seed, case.dtype, case.device), layout) for seed in range(4))
    strength, g, means = torch.ones(2, device=case.device), torch.ones(1, device=case.device), means_on(case)
    library, names = torch.ops.negengine, (case.backend,)
    torch.library.opcheck(library.guide, (c, n, strength, u, g, True, 2, *names))
    torch.library.opcheck(library.guide, (c, n, strength, None, None, False, 1, *names))
    torch.library.opcheck(library.evidence, (x, u, c, n, means, None, None, False, 1.5, *names))
    torch.library.opcheck(library.nag, (c, n, 5.0, 2.5, 0.25, *names))
    torch.library.opcheck(library.nag_, (c, n, 5.0, 2.5, 0.25, *names))
    torch.library.opcheck(library.nag_both_, (c, n, 5.0, 2.5, 0.25, *names))


def test_shapes_on_the_meta_device():
    x, one = torch.empty(2, 3, 5, device="meta", dtype=torch.bfloat16), torch.ones(2, device="meta")
    assert ops.guide(x, x, one, copies=3).shape == (6, 3, 5)
    found = ops.evidence(x, x, x, x, torch.empty(4, device="meta", dtype=torch.float64))
    assert (found.shape, found.dtype) == ((2,), torch.float64)
    assert ops.nag(x, x, 5.0, 2.5, 0.25).dtype == torch.bfloat16
    assert ops.nag_(x, x, 5.0, 2.5, 0.25, both=True) is x


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_compiled(dynamic):
    def function(x, strength, g, scale):
        u, c, n = x.chunk(3)
        y = ops.guide(c, n, strength, u, g, copies=2)
        stream = x.clone()
        ops.nag_(stream[: len(x) // 2], stream[len(x) // 2 :], scale, 2.5, 0.25, both=True)
        other = x * 2
        ops.nag_(other[:, 1:], x[:, 1:], scale, 2.5, 0.25)
        return y + 1, stream, other, ops.evidence(u, c, c, n, torch.ones(4, dtype=torch.float64))

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows, scale in ((6, 5.0), (6, 3.0), (12, 7.0)):
        x, strength, g = torch.randn(rows, 5, 8), torch.rand(rows // 3), torch.tensor([7.5])
        before = x.clone()
        assert all(torch.equal(a, b) for a, b in zip(compiled(x, strength, g, scale), function(x, strength, g, scale), strict=True))
        assert torch.equal(x, before)
