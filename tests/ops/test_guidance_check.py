"""The Triton kernels of guidance are tried before a GPU's calls go to them by themselves."""

import dataclasses
import logging

import pytest
import torch

from negengine.ops import guidance_check, registry, verdicts

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    monkeypatch.setattr(guidance_check, "_known", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv(verdicts.VARIABLE, raising=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_right_kernels_pass(backend, dtype):
    found = registry._BACKENDS[backend]
    if found.missing() is not None:
        pytest.skip(found.missing())
    assert guidance_check.wrong(CPU, dtype, backend) is None


def off_by(name, factor):
    """The torch backend with one operator whose results are slightly too large."""
    right = registry._BACKENDS["torch"].guidance

    def changed(call):
        result = getattr(right, name)(call)
        return call.out.mul_(factor) if result is None else result * factor

    return dataclasses.replace(registry._BACKENDS["torch"], guidance=dataclasses.replace(right, **{name: changed}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["guide", "evidence", "nag"])
def test_wrong_kernels_are_found(name, dtype, monkeypatch):
    factor = 1 + (1e-3 if name == "evidence" else 4 * torch.finfo(dtype).eps + 1e-4)
    monkeypatch.setitem(registry._BACKENDS, "torch", off_by(name, factor))
    assert f"{name} of 4096 elements is" in guidance_check.wrong(CPU, dtype, "torch")


def test_kernels_that_do_not_run_are_found(monkeypatch):
    def fails(call):
        raise RuntimeError("no such instruction")

    torch_s = registry._BACKENDS["torch"]
    monkeypatch.setitem(
        registry._BACKENDS, "torch", dataclasses.replace(torch_s, guidance=dataclasses.replace(torch_s.guidance, nag=fails))
    )
    assert guidance_check.wrong(CPU, torch.float32, "torch") == "they do not run: RuntimeError: no such instruction"


def test_they_are_tried_once(monkeypatch, caplog):
    tried = []
    monkeypatch.setattr(guidance_check, "wrong", lambda device, dtype: tried.append((device, dtype)))
    for _ in range(3):
        assert guidance_check.defers(GPU, torch.bfloat16) is None
    assert tried == [(GPU, torch.bfloat16)]
    monkeypatch.setattr(guidance_check, "wrong", lambda device, dtype: "nag is 3 off")
    with caplog.at_level(logging.WARNING, "negengine"):
        for _ in range(2):
            assert guidance_check.defers(GPU, torch.float16) == "nag is 3 off"
    assert len(caplog.records) == 1
    assert "nag is 3 off" in caplog.text


def test_what_the_environment_says(monkeypatch):
    monkeypatch.setattr(guidance_check, "wrong", lambda device, dtype: "wrong")
    for mode, expected in (("trust", None), ("off", "NEGENGINE_VERIFY=off"), ("auto", "wrong")):
        monkeypatch.setenv(verdicts.VARIABLE, mode)
        assert guidance_check.defers(GPU, torch.float32) == expected
    assert "interpreter" in guidance_check.defers(CPU, torch.float32)
    monkeypatch.setattr(guidance_check, "_known", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in guidance_check.defers(GPU, torch.float32)
    assert not guidance_check._known
