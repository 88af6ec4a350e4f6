"""Every variant computes what the engine computes, else a comparison says nothing."""

import pytest
import torch

from negengine import ops, reference
from negengine.bench import SHAPES, gemm, rivals
from negengine.bench.published import published_backend
from negengine.bench.variants import ALPHA, THRESHOLD, variants
from negengine.ops import registry


def oracle(x, matching):
    references = reference.group_references("first", len(x), len(x))
    return reference.negtome_batch(x.double(), references, ALPHA, THRESHOLD, matching=matching)


@pytest.mark.parametrize("gate", ["half", "all", "none"])
@pytest.mark.parametrize("matching", ["paper", "release"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_variant_agrees_with_the_oracle(small, dtype, matching, gate):
    x = small.inputs(dtype, "cpu", gate=gate)
    expected = oracle(x, matching)
    found, _ = variants([x], matching, compiled=False)
    assert {"release", "lean", "gemm", "torch auto"} <= {v.name for v in found}
    for variant in found:
        if variant.prepare is not None:
            variant.prepare()
        (result,) = variant.run()
        if variant.role == "search":
            torch.testing.assert_close(result.float(), x[1:].flatten(0, 1).float() @ x[0].float().T, rtol=2e-2, atol=1)
            continue
        close = torch.isclose(result.double(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 6e-2).all(-1)
        right = 1.0 if variant.role == "ours" or dtype == torch.float32 else 0.97  # torch rounds 16-bit similarities
        assert close.double().mean() >= right, variant.name


@pytest.mark.parametrize("name", [pytest.param("release", marks=pytest.mark.exhaustive), "lean"])
def test_compiled_rivals_agree_with_the_plain_ones(small, name):
    torch.compiler.reset()
    x = small.inputs(torch.float32, "cpu")
    plain, compiled = (v for v in variants([x], "paper", backends=["torch"])[0] if v.name.startswith(name))
    assert compiled.name == f"{name} + compile"
    torch.testing.assert_close(compiled.run()[0], plain.run()[0], rtol=0, atol=1e-5)


def test_ours_starts_from_the_same_input_each_round(small):
    x = small.inputs(torch.float32, "cpu")
    before = x.clone()
    ours = variants([x, x.flip(1)], "paper")[0][0]
    ours.prepare()
    first = [y.clone() for y in ours.run()]
    ours.prepare()
    again = ours.run()
    assert len(again) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(x, before)
    assert not torch.equal(again[0], x)


@pytest.mark.parametrize("matching", ["paper", "release"])
def test_the_published_backend_takes_each_group_by_itself(small, matching):
    groups = [small.inputs(torch.float32, "cpu", seed=seed) for seed in (0, 1)]
    x = torch.cat(groups)
    references = reference.group_references("first", 6, 3)
    expected = torch.cat([oracle(group, matching) for group in groups])
    with registry.registered(published_backend(3, ALPHA, THRESHOLD)) as published:
        result = ops.negtome_(x.clone(), references, ALPHA, THRESHOLD, matching=matching, backend=published.name)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-4)
        with pytest.raises(NotImplementedError, match="first image"):
            ops.negtome_(x, references, ALPHA, THRESHOLD, keep=torch.ones(6, 64, dtype=torch.bool), backend=published.name)


def test_release_writes_over_its_input(small):
    x = small.inputs(torch.float32, "cpu")
    expected = rivals.release(x, ALPHA, THRESHOLD)
    assert torch.equal(rivals.release(x, ALPHA, THRESHOLD, out=x), expected)
    assert torch.equal(x, expected)


def test_gemm_is_the_search_alone(small):
    assert gemm(small.inputs(torch.float32, "cpu")).shape == (2 * 64, 64)
    assert SHAPES["flux-1024"].search_flop == pytest.approx(309e9, rel=0.01)


def test_a_rival_that_is_not_there_is_named(small):
    if rivals.flash_kmeans_missing("cpu") is None:
        pytest.fail("flash-kmeans runs on GPUs only")
    _, left_out = variants([small.inputs(torch.float32, "cpu")], "paper", compiled=False)
    assert left_out["flash-kmeans"]
    assert "--all-cases" in left_out["release + compile"]
