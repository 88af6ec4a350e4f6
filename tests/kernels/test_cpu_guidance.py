"""What the contract does not see of the native kernels of guidance: instruction sets, memory, error codes.

The sanitizers run them through ``kernels/cpu/tests/guidance.hpp``; see test_cpu.py.
"""

import ctypes

import pytest
import torch
from negengine.kernels.cpu import library

from negengine import ops
from negengine.ops import cpu
from negengine.reference import guidance as reference

MISSING = library.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_instruction_set_gives_the_same_bits(dtype):
    c, n, u, x = (torch.randn(2, 5000).to(dtype) for _ in range(4))
    c[0, ::7] *= 1e4  # some results leave float16, some leave its normal numbers
    c[1, ::5] *= 1e-6
    strength, g = torch.tensor([0.3, 2.0]), torch.tensor([7.5])
    means = torch.tensor(reference.means_of(0.3, 0.4), dtype=torch.float64)
    before, found = library.isa(), []
    try:
        for name in library.ISAS[: library.ISAS.index(before) + 1]:
            library.set_isa(name)
            sums = torch.ops.negengine.evidence(x, n, c, n, means, u, g, True, 1.0, "cpu")
            tokens = (ops.nag(c.view(2, -1, 200), n.view(2, -1, 200), scale, 2.5, 0.25, "cpu") for scale in (5.0, 1.3))
            found.append((ops.guide(c, n, strength, u, g, True, 2, "cpu"), sums, *tokens))
    finally:
        library.set_isa(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_value_is_read_and_rounded_as_torch_does(dtype):
    """All bit patterns of 16 bits, and float32 results on both sides of and between their neighbours."""
    if dtype == torch.float32:
        values = torch.randn(2**16) * 2.0 ** torch.randint(-140, 120, (2**16,))
    else:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()][None]
    for strength in (0.0, 0.5, 1 / 3):
        y = ops.guide(values, torch.zeros_like(values), torch.full((1,), strength), backend="cpu")
        wide = values.float()
        expected = (wide + torch.tensor(strength) * wide).to(dtype)
        assert torch.equal(y, expected)


def test_the_workspace_holds_partial_sums_alone():
    space = cpu.workspace()
    space.release()
    x, means = torch.randn(4, 100_000), torch.ones(4, dtype=torch.float64)
    ops.guide(x, x, torch.ones(4), backend="cpu")
    ops.nag(x.view(4, 100, 1000), x.view(4, 100, 1000), 5.0, 2.5, 0.25, backend="cpu")
    assert space.bytes == 0
    ops.evidence(x, x, x, x, means, backend="cpu")
    assert 0 < space.bytes <= 8192


def test_wrong_arguments_give_codes():
    x, sums = torch.randn(2, 8), torch.empty(3, 2, dtype=torch.float64)
    branches = cpu._branches(cpu.Predictions(x, x, None, None, False))
    transition = library.Transition(x.data_ptr(), x.data_ptr(), 8, 8, (1.0,) * 4, 1.0, 0, 0)
    call, space = library.library().negengine_evidence, library.Workspace(0)

    def status():
        return call(space.handle, ctypes.byref(branches), ctypes.byref(transition), sums.data_ptr())

    assert status() == 0
    for structure, name, value in ((branches, "dtype", 3), (branches, "negative", None), (transition, "clip", float("nan"))):
        kept = getattr(structure, name)
        setattr(structure, name, value)
        assert status() == 1, name
        setattr(structure, name, kept)
    branches.n = 2**41
    assert status() == 2
