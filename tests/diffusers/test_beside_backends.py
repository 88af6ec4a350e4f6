"""Attention backends of diffusers: methods listen where the output appears, whichever computed it."""

import functools
import itertools

import pytest
import torch
from compare import assert_same, hooked
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from guards import guarded
from tiny import BUILDERS, denoiser, draw, flux

import negengine
from negengine import NegToMe

MERGE = {"timesteps": (0, 1000), "threshold": -1, "min_grid": 1}
CALL = functools.partial(draw, num_inference_steps=2)


@pytest.fixture(autouse=True)
def the_backend_of_others(monkeypatch):
    """What is set on one model becomes that of all that have none of their own."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_that_run_on_a_cpu(backend):
    """Bit for bit as merged within the attention, which is PyTorch's there too."""
    if backend == "native":
        assert_same("flux", CALL, 2, prepare=lambda pipe: pipe.transformer.set_attention_backend("native"))
        return
    pipe = flux()
    pipe.transformer.set_attention_backend(backend)
    plain = CALL(pipe)
    merged, _ = hooked(pipe, CALL, **MERGE)
    torch.testing.assert_close(merged, hooked(flux(), CALL, **MERGE)[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, plain, atol=1e-2)


# those of GPUs: their packages are not here, so that diffusers refuses to set them
ABSENT = ["flash", "sage", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("_flash_3", "xformers", "flash_hub"))]


@pytest.mark.parametrize("backend", ABSENT)
def test_one_that_cannot_be_set_here_disturbs_nothing(backend):
    pipe = negengine.apply(flux(), NegToMe(**MERGE))
    merged = CALL(pipe)
    with pytest.raises((RuntimeError, ImportError, ModuleNotFoundError)):
        pipe.transformer.set_attention_backend(backend)
    assert torch.equal(CALL(pipe), merged)


ORDERS = ("set first", "set after a run")
WAYS = guarded(itertools.product(("flash", "sage", "xformers"), ORDERS), lambda backend, order: order == ORDERS[1])


@pytest.mark.parametrize("backend, order", WAYS)
def test_the_way_through_one_of_a_gpu(backend, order, monkeypatch):
    """What those compute stands for PyTorch's own here: the way of the tokens to and from them is theirs."""
    calls = []

    def computed(query, key, value, attn_mask=None, **kwargs):
        calls.append(backend)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    name = AttentionBackendName(backend)
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, computed)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, name, {"query", "key", "value", "attn_mask"})
    monkeypatch.setattr(attention_dispatch, "_check_attention_backend_requirements", lambda backend: None)
    monkeypatch.setattr(attention_dispatch, "_maybe_download_kernel_for_backend", lambda backend: None)
    expected, _ = hooked(flux(), CALL, **MERGE)
    pipe = flux()
    if order == "set after a run":
        hooked(pipe, CALL, **MERGE)
    pipe.transformer.set_attention_backend(backend)
    got = CALL(pipe) if order == "set after a run" else hooked(pipe, CALL, **MERGE)[0]
    assert calls
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", ["flux", pytest.param("sdxl", marks=pytest.mark.exhaustive)])
def test_xformers_of_the_pipeline_is_refused_by_diffusers_and_disturbs_nothing(family):
    pipe = negengine.apply(BUILDERS[family](), NegToMe(**MERGE))
    merged = CALL(pipe)
    with pytest.raises((ModuleNotFoundError, ValueError)):
        pipe.enable_xformers_memory_efficient_attention()
    assert torch.equal(CALL(pipe), merged)


def test_sliced_attention():
    """A processor of its own, on UNets."""
    pipe = negengine.apply(BUILDERS["sdxl"](), NegToMe(**MERGE))
    merged = CALL(pipe)
    pipe.enable_attention_slicing(1)
    assert type(next(iter(denoiser(pipe).attn_processors.values()))).__name__ == "SlicedAttnProcessor"
    torch.testing.assert_close(CALL(pipe), merged, rtol=1e-3, atol=1e-2)
    plain = BUILDERS["sdxl"]()
    plain.enable_attention_slicing(1)
    assert torch.equal(CALL(negengine.remove(pipe)), CALL(plain))
