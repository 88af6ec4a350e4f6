"""Stacks and pipelines: the three ways do what they say, in the same places."""

import dataclasses

import pytest
import torch

import negengine
from negengine import models
from negengine.bench import end_to_end, stacks
from negengine.bench.stacks import STACKS, TRANSFORMER_BLOCKS, Stack, build
from negengine.bench.variants import usable
from negengine.diffusers import families
from negengine.interleave import Timing
from negengine.ops import registry

OURS = " ".join(usable("cpu", torch.float32)[0])  # the preferred backend and search
SMALL = {"sdxl": Stack("small", "sdxl", 64, 128, layers=2), "flux": Stack("small", "flux", 16, 256)}


@pytest.fixture(autouse=True)
def small_text(monkeypatch):
    monkeypatch.setattr(stacks, "FLUX_TEXT", 4)


@pytest.fixture(params=SMALL)
def family(request):
    return request.param


@pytest.fixture
def published(family):
    with registry.registered(SMALL[family].published) as backend:
        yield backend


@torch.inference_mode()
@families.registered(TRANSFORMER_BLOCKS)
def test_ours_and_the_published_algorithm_agree_in_a_stack(family, published):
    stack = SMALL[family]
    results = {}
    for name, backend in (("without", None), ("ours", "torch"), ("published", published.name)):
        model, forward = build(stack, torch.float32, "cpu")
        if backend is not None:
            negengine.apply(model, dataclasses.replace(stack.settings, backend=backend))
        results[name] = forward()
        if name == "ours":
            status = negengine.status(model)[negengine.NegToMe]
    assert status.active_blocks == status.blocks == {"sdxl": 4, "flux": 3}[family]
    assert status.merged_tokens > 0
    torch.testing.assert_close(results["published"], results["ours"], rtol=0, atol=1e-4)
    assert not torch.allclose(results["without"], results["ours"], rtol=0, atol=1e-2)


def test_the_family_of_the_stacks_is_in_no_error_message():
    with pytest.raises(TypeError, match="It knows") as error:
        negengine.apply(torch.nn.Linear(1, 1), negengine.NegToMe())
    assert TRANSFORMER_BLOCKS.name not in str(error.value)


def test_rows_of_a_stack():
    found = end_to_end.measure_stack(SMALL["sdxl"], torch.bfloat16, "cpu", rounds=2)
    assert [row["variant"] for row in found] == ["without", OURS, "published"]
    assert found[0]["overhead"] == 0
    assert found[1]["overhead"] == pytest.approx(found[1]["median"] / found[0]["median"] - 1)
    assert {"stack", "tokens", "channels", "layers", "batch", "dtype", "p10", "p90", "rounds", "noise"} <= set(found[0])
    assert found[1]["batch"] == 8
    assert 0 < found[1]["merged_share"] <= 1


def test_a_gpu_measures_its_kernels_and_not_only_what_is_preferred(monkeypatch):
    """Kernels that wait to be asked for are asked for, and named."""
    monkeypatch.setitem(registry._BACKENDS, "triton", dataclasses.replace(registry._BACKENDS["cpu"], name="triton"))
    with_kernels = dict(usable("cpu", torch.float32, ["torch", "triton"]))
    monkeypatch.setattr(end_to_end, "usable", lambda device, dtype: list(with_kernels.items()))
    assert list(end_to_end.engines("cuda", torch.float32)) == [f"{b} {s}" for b, s in with_kernels.items()]
    assert {"torch", "triton"} == {backend for backend, _ in end_to_end.engines("cuda", torch.float32).values()}
    assert len(end_to_end.engines("cpu", torch.float32)) == 1


def test_rows_of_a_pipeline(monkeypatch):
    calls = []

    def once(variants, rounds, warmup):
        for name, call in variants.items():
            calls.append(name)
            if name != end_to_end.AGAIN:
                call()
        return {name: Timing((1.0 if name.startswith("without") else 1.2,)) for name in variants}

    monkeypatch.setattr(end_to_end, "interleave", once)
    few = dataclasses.replace(models.preset("mnist-flux"), steps=4)
    monkeypatch.setattr(models, "preset", lambda name: few)
    found = end_to_end.measure_pipeline("mnist-flux", "cpu", rounds=1)
    assert calls == ["without", OURS, "published", "without (again)"]
    assert [row["overhead"] for row in found] == [0, pytest.approx(0.2), pytest.approx(0.2)]
    assert found[0]["noise"] == 0
    assert found[1]["merged_share"] > 0


def test_stacks_have_the_widths_of_the_models():
    assert {(s.tokens, s.channels) for s in STACKS["cpu"]} == {(1024, 1280), (4096, 640)}
    assert (4096, 3072) in {(s.tokens, s.channels) for s in STACKS["cuda"]}
