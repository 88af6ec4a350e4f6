"""The three operators as ``torch.library`` sees them: schema, fake tensors, functionalisation, compiled graphs."""

import pytest
import torch
from contract import cases
from guards import guarded

from negengine import ops
from negengine.ops import registry

SHAPES = {torch.float32: (2, 9, 5), torch.bfloat16: (3, 17, 8)}
CASES = pytest.mark.parametrize("case", [case for case in cases(("auto", "int8", "fp8")) if case.dtype in SHAPES], ids=str)
LAYOUTS = {
    "plain": lambda x: x,
    "view": lambda x: torch.cat([x[:, :2], x], 1)[:, 2:],
    "images_inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand_as(x),
}


def operands(case, layout="plain", own=False):
    B, T, D = SHAPES[case.dtype]
    x = LAYOUTS[layout](torch.randn(B, T, D).to(case.device, case.dtype))
    bank = None if own else torch.randn(3, T, D).to(x)
    references = torch.tensor([[-1, 0]] + [[0, 1]] * (B - 1), dtype=torch.int32, device=case.device)
    mask, keep = torch.rand(B if own else 3, T, device=case.device) > 0.2, torch.rand(B, T, device=case.device) > 0.2
    return x, bank, references, mask, keep


def settings(case):
    B = SHAPES[case.dtype][0]
    alpha = torch.full((B,), 0.9, dtype=torch.float64, device=case.device)
    return alpha, torch.zeros(1, dtype=torch.float64, device=case.device)


OWN_OR_MASKED = [(True, False), (False, True), (True, True)]
# of the further layouts the heaviest call
CALLS = guarded(
    ((*call, layout) for call in OWN_OR_MASKED for layout in LAYOUTS),
    lambda own, masked, layout: layout == "plain" or (own and masked),
)


@CASES
@pytest.mark.parametrize("own, masked, layout", CALLS)
def test_opcheck_match_and_negtome(case, layout, own, masked):
    x, bank, references, mask, keep = operands(case, layout, own)
    mask, keep = (mask, keep) if masked else (None, None)
    names = ("paper", case.search, case.backend)
    torch.library.opcheck(torch.ops.negengine.match, (x, bank, references, mask, *names))
    torch.library.opcheck(torch.ops.negengine.negtome, (x, bank, references, *settings(case), keep, mask, *names))


IN_PLACE = [(True, False, True), (False, True, False), (False, False, True), (True, True, False)]
CALLS_IN_PLACE = guarded(
    ((*call, layout) for call in IN_PLACE for layout in ("plain", "view", "images_inside")),
    lambda own, masked, counted, layout: layout == "plain" or (own and masked),
)


@CASES
@pytest.mark.parametrize("own, masked, counted, layout", CALLS_IN_PLACE)
def test_opcheck_in_place(case, layout, own, masked, counted):
    x, bank, references, mask, keep = operands(case, layout, own)
    mask, keep = (mask, keep) if masked else (None, None)
    stats = torch.zeros(3, dtype=torch.int64, device=case.device) if counted else None
    names = ("paper", case.search, case.backend)
    torch.library.opcheck(torch.ops.negengine.negtome_, (x, bank, references, *settings(case), keep, stats, mask, *names))


@CASES
def test_opcheck_of_what_a_graph_shows(case):
    """The operators that stand for those above in a compiled graph, where a backend has any."""
    traced = registry._BACKENDS[case.backend].traced
    if not traced:
        pytest.skip(f"backend {case.backend} stays opaque on {case.device}")
    for own in (True, False):
        x, bank, references, mask, keep = operands(case, own=own)
        names = ("paper", case.search)
        torch.library.opcheck(traced["match"], (x, bank, references, mask, *names))
        torch.library.opcheck(traced["negtome"], (x, bank, references, *settings(case), keep, mask, *names))
        stats = torch.zeros(3, dtype=torch.int64, device=case.device)
        torch.library.opcheck(traced["negtome_"], (x, bank, references, *settings(case), keep, stats, mask, *names))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("matching", ["paper", "release"])
def test_shapes_on_the_meta_device(dtype, matching):
    x, r = torch.empty(2, 7, 3, dtype=dtype, device="meta"), torch.empty(7, 3, dtype=dtype, device="meta")
    cosine, index = ops.match(x, r, matching=matching)
    assert cosine.shape == index.shape == (2, 7)
    assert cosine.device.type == "meta"
    assert cosine.dtype == torch.float32
    assert index.dtype == torch.int32
    y = ops.negtome(x, r, matching=matching)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.device.type == "meta"
    references = torch.zeros(2, 1, dtype=torch.int32, device="meta")
    assert ops.negtome_(x, references, 0.9, 0.65, matching=matching) is x


def compiled(function, dynamic=False):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_negtome(dynamic):
    def function(x, r, mask):
        return ops.negtome(x * 2, r, 0.9, 0.1, mask=mask) + 1

    x, r, mask = torch.randn(2, 13, 6), torch.randn(9, 6), torch.rand(9) > 0.3
    assert torch.equal(compiled(function, dynamic)(x, r, mask), function(x, r, mask))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_numbers_that_change(dynamic):
    def function(x, r, alpha, threshold):
        return ops.negtome(x, r, alpha, threshold)

    x, r, compiled_function = torch.randn(2, 13, 6), torch.randn(9, 6), compiled(function, dynamic)
    for alpha, threshold in ((0.9, 0.1), (1.0, 0.2), (-0.3, -1.0)):
        assert torch.equal(compiled_function(x, r, alpha, threshold), function(x, r, alpha, threshold))


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("own", [True, False])
def test_compiled_in_place(start, own):
    references = torch.tensor([[-1], [0], [1]], dtype=torch.int32)
    keep, bank = torch.rand(3, 13 - start) > 0.2, None if own else torch.randn(2, 8, 6)

    def function(x, stats):
        image = x[:, start:]
        ops.negtome_(image, references, 0.9, 0.1, bank=bank, keep=keep, stats=stats)
        return x.sum(1) + image.mean(1)

    x = torch.randn(3, 13, 6)
    runs = []
    for f in (function, compiled(function)):
        y, stats = x.clone(), torch.zeros(3, dtype=torch.int64)
        out = f(y, stats)
        f(torch.randn(3, 13, 6, generator=torch.Generator().manual_seed(1)), stats)
        runs.append((out, y, stats))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert runs[0][2][0] > 0
    assert runs[0][2][2] == 2
    assert not torch.equal(runs[0][1], x)
    assert torch.equal(runs[0][1][:, :start], x[:, :start])


def test_a_graph_keeps_the_chosen_backend():
    """The backend travels as an argument: a missing one fails in a compiled graph as it does outside."""

    def function(x, r):
        return ops.negtome(x, r, backend="torch", search="fp8")

    with pytest.raises(RuntimeError, match=r"torch: .*no search='fp8'"):
        compiled(function)(torch.randn(1, 4, 3), torch.randn(4, 3))
