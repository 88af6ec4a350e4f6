"""Calls of guidance that are empty, refused, or seen by torch.library; which backend takes them."""

from __future__ import annotations

import pytest
import torch
from contract import same_bits
from guidance_cases import CASES, cases, laid_out, means_on, values

from negengine import ops
from negengine.ops import registry

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
