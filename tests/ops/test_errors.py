"""Bad input of the public functions: one sentence that names the argument and what would do, before any work."""

import pytest
import torch

from negengine import ops

B, T, M, D = 2, 6, 5, 4


def arguments(**changes):
    return {"x": torch.randn(B, T, D), "reference": torch.randn(M, D)} | changes


def in_place(**changes):
    return {
        "x": torch.randn(B, T, D),
        "references": torch.zeros(B, 1, dtype=torch.int32),
        "alpha": 0.9,
        "threshold": 0.65,
    } | changes


BOTH = [
    ({"x": torch.randn(T, D)}, ValueError, r"x must have shape \[B, T, D\], got \[6, 4\]"),
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": torch.randn(1, B, T, D)}, ValueError, r"x must have shape \[B, T, D\]"),
    ({"x": torch.ones(B, T, D, dtype=torch.int64)}, TypeError, "x must be a floating-point tensor, got torch.int64"),
    ({"matching": "best"}, ValueError, r"matching must be one of \('paper', 'release'\), got 'best'"),
    ({"search": "fast"}, ValueError, "search must be one of .*'exact'.*, got 'fast'"),
    ({"backend": "cuda13"}, ValueError, "unknown backend 'cuda13'; there are .*torch"),
    ({"x": torch.randn(B, T, D, requires_grad=True)}, RuntimeError, "not differentiable.*no_grad"),
    ({"merging": 0.9}, TypeError, "unexpected keyword argument 'merging'"),
]

REFERENCE = [
    ({"reference": None}, TypeError, "reference must be a tensor, got NoneType"),
    ({"reference": torch.randn(D)}, ValueError, r"reference must have shape \[M, D\] or \[2, M, D\], got \[4\]"),
    ({"reference": torch.randn(3, M, D)}, ValueError, r"reference must have shape .*got \[3, 5, 4\]"),
    ({"reference": torch.randn(M, 3)}, ValueError, "must have the 4 channels of x"),
    ({"reference": torch.randn(0, D)}, ValueError, r"the reference is empty: shape \[1, 0, 4\]"),
    ({"reference": torch.randn(M, D).half()}, TypeError, "the reference is torch.float16 on cpu, x is torch.float32"),
    ({"reference": torch.randn(M, D, device="meta")}, TypeError, "on meta, x is .* on cpu; they must agree"),
    ({"reference": torch.randn(M, D, requires_grad=True)}, RuntimeError, "not differentiable.*no_grad"),
    ({"mask": torch.ones(M + 1, dtype=torch.bool)}, ValueError, r"mask must have shape \[5\] or \[2, 5\], got \[6\]"),
    ({"mask": torch.ones(M)}, TypeError, "mask must be bool, got torch.float32"),
    ({"mask": torch.ones(M, dtype=torch.bool, device="meta")}, TypeError, "mask is on meta, x on cpu"),
    ({"matching": "release"}, ValueError, "'release' .* 5 tokens for 6 source tokens; use matching='paper'"),
]

NUMBERS = [
    ({"alpha": torch.nan}, ValueError, "alpha must be finite, got nan"),
    ({"alpha": -torch.inf}, ValueError, "alpha must be finite, got -inf"),
    ({"alpha": None}, TypeError, "alpha must be a number or a tensor, got None"),
    ({"threshold": "0.5"}, TypeError, "threshold must be a number or a tensor, got '0.5'"),
    ({"alpha": torch.ones(3)}, ValueError, "alpha has 3 values for a batch of 2"),
    ({"threshold": 1.01}, ValueError, r"threshold .*must lie in \[-1, 1\], got 1.01"),
    ({"threshold": -1.01}, ValueError, r"threshold .*must lie in \[-1, 1\]"),
    ({"threshold": torch.nan}, ValueError, r"threshold .*must lie in \[-1, 1\], got nan"),
    ({"threshold": torch.zeros(2)}, ValueError, "threshold has 2 values; give one"),
]

TABLES = [
    ({"references": torch.zeros(B, dtype=torch.int32)}, ValueError, r"references must have shape \[2, K\]"),
    ({"references": torch.zeros(3, 1, dtype=torch.int32)}, ValueError, r"references must have shape \[2, K\]"),
    ({"references": torch.zeros(B, 0, dtype=torch.int32)}, ValueError, "with K >= 1"),
    ({"references": torch.zeros(B, 1)}, TypeError, "references must be int32, got torch.float32"),
    ({"references": torch.zeros(B, 1, dtype=torch.int32, device="meta")}, TypeError, "references is on meta, x on cpu"),
    ({"table": [0]}, ValueError, "table must have the 2 entries of references, got 1"),
    ({"table": [0, 1]}, ValueError, r"table must hold the entries of references, \[0, 0\], got \[0, 1\]"),
    ({"table": [2, 0], "references": torch.tensor([[2], [0]]).int()}, ValueError, "references names image 2 of a bank of 2"),
    ({"x": torch.randn(1, T, D).expand(B, T, D)}, ValueError, r"x repeats the same memory .*call x.contiguous\(\) first"),
    ({"bank": torch.randn(M, D)}, ValueError, "must have the 4 channels of x"),
    ({"bank": torch.randn(0, M, D)}, ValueError, "the reference is empty"),
    ({"bank": torch.randn(3, M, D).double()}, TypeError, "the reference is torch.float64"),
    ({"mask": torch.ones(B, M, dtype=torch.bool)}, ValueError, r"mask must have shape \[2, 6\], got \[2, 5\]"),
    ({"keep": torch.ones(T, dtype=torch.bool)}, ValueError, r"keep must have shape \[2, 6\], got \[6\]"),
    ({"keep": torch.ones(B, T)}, TypeError, "keep must be bool, got torch.float32"),
    ({"keep": torch.ones(B, T, dtype=torch.bool, device="meta")}, TypeError, "keep is on meta, x on cpu"),
    ({"stats": torch.zeros(2, dtype=torch.int64)}, ValueError, r"stats must have shape \[3\], got \[2\]"),
    ({"stats": torch.zeros(3)}, TypeError, "stats must be int64, got torch.float32"),
    ({"stats": torch.zeros(3, dtype=torch.int64, device="meta")}, TypeError, "stats is on meta, x on cpu"),
    (
        {"matching": "release", "references": torch.zeros(B, 2, dtype=torch.int32)},
        ValueError,
        "got 2 reference images of 6 tokens for 6 source tokens",
    ),
]


def fails(function, given, error, message):
    before = {
        name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor) and value.device.type == "cpu"
    }
    with pytest.raises(error, match=message) as caught:
        function(**given)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(given[name], value) for name, value in before.items())


@pytest.mark.parametrize("function", [ops.match, ops.negtome])
@pytest.mark.parametrize("changes,error,message", BOTH + REFERENCE)
def test_match_and_negtome(function, changes, error, message):
    fails(function, arguments(**changes), error, message)


@pytest.mark.parametrize("changes,error,message", NUMBERS)
def test_numbers(changes, error, message):
    fails(ops.negtome, arguments(**changes), error, message)
    fails(ops.negtome_, in_place(**changes), error, message)


@pytest.mark.parametrize("changes,error,message", BOTH + TABLES)
def test_negtome_in_place(changes, error, message):
    fails(ops.negtome_, in_place(**changes), error, message)


def test_without_gradients_a_tensor_that_requires_them_is_taken():
    with torch.no_grad():
        assert not ops.negtome(**arguments(x=torch.randn(B, T, D, requires_grad=True))).requires_grad


# --- the operators themselves, as exported programs and C++ call them -----------------------------------------------


def operands(**changes):
    given = {
        "x": torch.randn(B, T, D),
        "bank": torch.randn(B, T, D),
        "references": torch.zeros(B, 1, dtype=torch.int32),
        "alpha": torch.ones(B, dtype=torch.float64),
        "threshold": torch.zeros(1, dtype=torch.float64),
        "keep": None,
        "stats": torch.zeros(3, dtype=torch.int64),
        "mask": None,
        "matching": "paper",
        "search": "auto",
        "backend": None,
    }
    return given | changes


BARE = [
    ({"bank": torch.randn(B, T, D).half()}, TypeError, "the reference is torch.float16"),
    ({"bank": torch.randn(1, 4, D + 4)}, ValueError, "must have the 4 channels of x"),
    ({"references": torch.zeros(B, 1, dtype=torch.int64)}, TypeError, "references must be int32"),
    ({"references": torch.zeros(1, 1, dtype=torch.int32)}, ValueError, "references must have shape"),
    ({"mask": torch.ones(1, 1, dtype=torch.bool)}, ValueError, "mask must have shape"),
    ({"mask": torch.ones(B, T)}, TypeError, "mask must be bool"),
    ({"matching": "papr"}, ValueError, "matching must be one of"),
    ({"alpha": torch.ones(B)}, TypeError, "alpha must be float64, got torch.float32"),
    ({"alpha": torch.ones(1, dtype=torch.float64)}, ValueError, r"alpha must have shape \[2\], got \[1\]"),
    ({"threshold": torch.zeros(2, dtype=torch.float64)}, ValueError, r"threshold must have shape \[1\]"),
    ({"keep": torch.ones(1, 1, dtype=torch.bool)}, ValueError, "keep must have shape"),
    ({"stats": torch.zeros(1, dtype=torch.int32)}, TypeError, "stats must be int64"),
    ({"table": [0, 0, 0]}, ValueError, "table must have the 2 entries of references, got 3"),
]


OPERATORS = {name: getattr(torch.ops.negengine, name).default for name in ("match", "negtome", "negtome_")}
TAKES = {name: {argument.name for argument in operator._schema.arguments} for name, operator in OPERATORS.items()}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name,changes,error,message", [(n, *c) for n in OPERATORS for c in BARE if TAKES[n].issuperset(c[0])])
def test_operators(name, changes, error, message, device):
    def call(**changes):
        given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in operands(**changes).items()}
        return OPERATORS[name](**{k: v for k, v in given.items() if k in TAKES[name]})

    call()
    with pytest.raises(error, match=message):
        call(**changes)


def test_a_table_on_a_device_is_checked_by_what_the_caller_knows_of_it():
    """The host must not read it; what it was told is all that it can check."""
    x, references = torch.empty(B, T, D, device="meta"), torch.empty(B, 1, dtype=torch.int32, device="meta")

    def call(table):
        return ops.negtome_(x, references, 0.9, 0.0, disjoint=True, table=table)

    assert call(None) is call([-1, 0]) is x
    with pytest.raises(ValueError, match="both has a reference and is one"):
        call([1, 0])
    with pytest.raises(ValueError, match="references names image 2 of a bank of 2"):
        call([2, 0])


def test_an_image_that_the_bank_lacks():
    for backend in (name for name, missing in ops.backends().items() if missing is None and name != "triton"):
        with pytest.raises(ValueError, match="references"):
            ops.negtome_(torch.randn(B, T, D), torch.tensor([[5], [0]], dtype=torch.int32), 0.9, 0.0, backend=backend)
