"""When a pipeline lets the Triton kernels prove themselves, with a stand-in for the proof."""

import sys
from pathlib import Path

import pytest
import torch

import negengine
from negengine import NegToMe, ops
from negengine.diffusers.effects import negtome as module
from negengine.ops import verdicts

sys.path.insert(0, str(Path(__file__).parent))
import tiny

EVERYWHERE = {"timesteps": (0, 1000), "threshold": -1.0, "min_grid": 1}


@pytest.fixture
def asked(monkeypatch):
    """What the plug-in asks for; every time it is told that the kernels were found wrong."""
    calls = []

    def settle(devices, dtype, search, matching, channels):
        calls.append((set(devices), dtype, search, matching, set(channels)))
        return [ops.Verdict(False, "a wrong row")]

    monkeypatch.setattr(module, "settle", settle)
    yield calls
    verdicts.unpin()


@pytest.mark.parametrize("family,channels", [("flux", {32}), ("sdxl", {32, 64})])
def test_apply_and_each_pipeline_call_ask(asked, family, channels):
    pipe = getattr(tiny, family)()
    negengine.apply(pipe, NegToMe(search="exact", **EVERYWHERE))
    expected = ({torch.device("cpu")}, torch.float32, "exact", "paper", channels)
    assert asked == [expected]
    assert negengine.status(pipe)[negengine.NegToMe].kernels == "wrong (a wrong row)"
    pinned = []

    def stepped(pipe, step, timestep, tensors):
        pinned.append(verdicts._pinned.view is not None)
        return tensors

    call = {"num_images_per_prompt": 2, "num_inference_steps": 2, "output_type": "latent", **tiny.SIZE[family]}
    pipe("a cat", callback_on_step_end=stepped, **call)
    assert asked == [expected, expected]
    assert pinned == [True, True]
    assert verdicts._pinned.view is None
    assert "; Triton kernels: wrong (a wrong row)" in str(negengine.status(pipe))


def test_a_named_backend_is_not_asked_about(asked):
    pipe = tiny.flux()
    negengine.apply(pipe, NegToMe(backend="torch", **EVERYWHERE))
    pipe("a cat", num_images_per_prompt=2, num_inference_steps=1, output_type="latent", **tiny.SIZE["flux"])
    assert asked == []
    assert negengine.status(pipe)[negengine.NegToMe].kernels is None


def test_on_a_cpu_nothing_is_proven():
    pipe = negengine.apply(tiny.flux(), NegToMe(**EVERYWHERE))
    assert negengine.status(pipe)[negengine.NegToMe].kernels is None
