"""Plans: what a call is launched with after the first of its signature. What it computes is the contract's subject."""

import gc
import itertools
import weakref

import pytest
import torch

pytest.importorskip("triton")
import triton
from negengine.kernels.call import Call
from negengine.kernels.triton import launch, plan, tuning
from triton.tools.tensor_descriptor import TensorDescriptor

from negengine.reference import group_references

STREAM = 7


class Variant(triton.compiler.CompiledKernel):
    """A compiled kernel that notes what it is launched with."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.launched.append((self.kernel, grid, arguments, stream))


class Seen:
    """What Triton was asked to launch, and what was launched without it."""

    def __init__(self):
        self.asked, self.launched = [], []

    def through_triton(self, launch):
        self.asked.append(launch)
        return Variant(launch.kernel, self.launched)


@pytest.fixture
def seen(monkeypatch):
    """Calls on the CPU, as if that were a GPU and nothing had been called before."""

    class Driver:
        class active:
            get_current_stream = staticmethod(lambda device: STREAM)

    found = Seen()
    monkeypatch.setattr(triton.runtime, "driver", Driver)
    monkeypatch.setattr(launch, "_planned", lambda x: True)
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(launch, "architecture", lambda device: tuning.ARCHITECTURES["sm_90"])
    monkeypatch.setattr(plan.Launch, "__call__", lambda self: found.through_triton(self))
    monkeypatch.delenv("NEGENGINE_TUNE", raising=False)
    return found


def call_of(x, mode="first", **changed):
    B = len(x)
    table = group_references(mode, B, B)
    numbers = {"alpha": torch.zeros(B, dtype=torch.float64), "threshold": torch.zeros(1, dtype=torch.float64)}
    given = {"stats": torch.zeros(3, dtype=torch.int64), "disjoint": mode == "first", "table": table.flatten().tolist()}
    named = {"x": x, "bank": x, "references": table, "mask": None, "matching": "paper", "search": "exact", "y": x}
    return Call(**named | numbers | given | changed)


def of(pointer):
    """Address, and if it is a descriptor its form."""
    if isinstance(pointer, int):
        return pointer, None
    base = pointer.base if hasattr(pointer, "base") else pointer
    return base.data_ptr(), (list(pointer.shape), list(pointer.strides)) if base is not pointer else None


@pytest.mark.parametrize("search", ["exact", "fp8"])
@pytest.mark.parametrize("mode", ["first", "others"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_later_calls_launch_what_the_first_did(seen, dtype, mode, search):
    """With the addresses of their own tensors, and of workspace that no two pieces of overlap."""
    first, second = (call_of(torch.randn(3, 200, 256).to(dtype), mode, search=search) for _ in range(2))
    launch.negtome(first)
    assert (len(seen.asked), len(seen.launched)) == (3, 0)
    launch.negtome(second)
    assert len(seen.asked) == len(seen.launched) == 3
    own = {t.data_ptr(): new.data_ptr() for t, new in zip(first, second, strict=True) if isinstance(t, torch.Tensor)}
    moved, extents = {}, {}
    for asked, (kernel, grid, arguments, stream) in zip(seen.asked, seen.launched, strict=True):
        assert (kernel, grid, stream) == (asked.kernel, (asked.programs, 1, 1), STREAM)
        count = len(asked.pointers)
        assert arguments[count : count + len(asked.sizes)] == asked.sizes
        names = kernel.arg_names[count + len(asked.sizes) :]
        assert arguments[count + len(asked.sizes) :] == tuple(asked.constants[name] for name in names)
        for before, now in zip(asked.pointers, arguments[:count], strict=True):
            tensor = before.base if isinstance(before, TensorDescriptor) else before
            (address, form), (_, expected) = of(now), of(before)
            assert form == expected
            if tensor.data_ptr() in own:
                assert address == own[tensor.data_ptr()]
            else:  # the same piece, wherever it is named
                assert moved.setdefault(tensor.data_ptr(), address) == address
                extents[address] = tensor.nbytes
    ordered = sorted(extents.items())
    assert len(ordered) > 4
    assert all(start + length <= after for (start, length), (after, _) in itertools.pairwise(ordered))


X = torch.randn(4, 33, 64)
OTHER = {
    "as it was": (call_of(X), 0),
    "another batch": (call_of(X[:3]), 1),
    "fewer tokens": (call_of(X[:, :32]), 1),
    "fewer channels": (call_of(X[..., :40]), 1),
    "rows further apart": (call_of(torch.randn(4, 40, 64)[:, :33]), 1),
    "another beginning": (call_of(torch.randn(4 * 33 * 64 + 1)[1:].view(4, 33, 64)), 1),
    "another dtype": (call_of(X.half()), 1),
    "another table": (call_of(X, table=[-1, 0, 0, -1]), 1),
    "a table of the device": (call_of(X, table=None), 1),
    "references of others": (call_of(X, "others"), 1),
    "nothing promised": (call_of(X, disjoint=False), 1),
    "into new memory": (call_of(X, y=torch.empty_like(X)), 1),
    "a bank": (call_of(X, bank=torch.randn(4, 33, 64)), 1),
    "a bank in the same memory": (call_of(X, bank=X[:]), 1),
    "a mask": (call_of(X, mask=torch.ones(4, 33, dtype=torch.bool)), 1),
    "dropped tokens": (call_of(X, keep=torch.ones(4, 33, dtype=torch.bool)), 1),
    "no counts": (call_of(X, stats=None), 1),
    "one alpha for all": (call_of(X, alpha=torch.zeros(1, dtype=torch.float64).expand(4)), 1),
    "other matching": (call_of(X, matching="release"), 1),
    "another search": (call_of(X, search="fp8"), 1),
}


@pytest.mark.parametrize("what", OTHER)
def test_what_makes_another_plan(seen, what):
    """Whatever a launch depends on; only what is the same goes without Triton."""
    launch.negtome(call_of(X))
    call, planned = OTHER[what]
    launch.negtome(call)
    assert len(launch._plans) == 1 + planned
    assert len(seen.launched) == (0 if planned else 3)


def test_a_copy_is_no_argument(seen):
    """Channels that do not lie side by side are copied first, and a plan would launch with a copy of another call."""
    for _ in range(2):
        launch.negtome(call_of(torch.randn(4, 64, 33).transpose(1, 2), y=torch.empty(4, 33, 64)))
    assert (len(seen.asked), len(seen.launched), len(launch._plans)) == (6, 0, 0)


def test_plans_hold_no_memory_and_do_not_add_up(seen, monkeypatch):
    """Not even that of the call that they were made for."""
    monkeypatch.setattr(launch, "MOST_PLANS", 3)
    held = []
    for tokens in range(1, 9):
        call = call_of(torch.randn(2, tokens, 16))
        launch.negtome(call)
        held += [weakref.ref(t) for t in call if isinstance(t, torch.Tensor)]
        assert len(launch._plans) <= 3
    seen.asked.clear()
    del call
    gc.collect()
    assert not any(ref() is not None for ref in held)
