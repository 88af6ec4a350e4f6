"""The rivals compute what the engine computes, else a comparison says nothing."""

import pytest
import torch

from negengine import ops, reference
from negengine.bench import SHAPES, Shape, gemm, interleave, lean, release

SMALL = Shape("small", 3, 64, 48)


@pytest.mark.parametrize("matching", ["paper", "release"])
@pytest.mark.parametrize("rival", [release, lean])
def test_rivals_agree_with_the_engine(rival, matching):
    x = SMALL.inputs(torch.float32, "cpu")
    ours = ops.negtome_(x.clone(), reference.group_references("first", 3, 3), 0.9, 0.65, matching=matching)
    theirs = rival(x, 0.9, 0.65, matching)
    assert torch.equal(ours[1:], theirs[1:])
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-5)


def test_inputs_open_the_gate_for_about_half_the_tokens():
    x = SMALL.inputs(torch.float32, "cpu")
    stats = torch.zeros(3, dtype=torch.int64)
    ops.negtome_(x, reference.group_references("first", 3, 3), 0.9, 0.65, stats=stats)
    assert 0.3 < stats[0] / stats[1] < 0.7


def test_gemm_is_the_search_alone():
    x = SMALL.inputs(torch.float32, "cpu")
    assert gemm(x).shape == (2 * 64, 64)
    assert SHAPES["flux-1024"].search_flop == pytest.approx(309e9, rel=0.01)


def test_variants_take_turns():
    calls = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert all(len(t.seconds) == 3 and t.percentile(10) <= t.median <= t.percentile(90) for t in timings.values())
