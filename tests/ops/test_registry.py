"""A backend that is asked for runs, or says why it cannot; never another one in its place."""

import dataclasses

import pytest
import torch

from negengine import ops
from negengine.ops import registry

CPU = torch.device("cpu")


@pytest.fixture
def fake(monkeypatch):
    """Registers a copy of the torch backend under another name; gone after the test."""
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))

    def add(first: bool = False, **changes) -> None:
        ops.register_backend(dataclasses.replace(registry._BACKENDS["torch"], name="fake", **changes))
        if first:
            registry._BACKENDS = {"fake": registry._BACKENDS.pop("fake"), **registry._BACKENDS}

    return add


def call(**names):
    return ops.negtome(torch.randn(1, 4, 3), torch.randn(5, 3), **names)


def test_torch_works_everywhere():
    assert ops.backends()["torch"] is None


def test_unknown_backend():
    for function in (ops.match, ops.negtome):
        with pytest.raises(ValueError, match=r"unknown backend 'cuda13'; there are .*torch"):
            function(torch.randn(1, 4, 3), torch.randn(5, 3), backend="cuda13")


def test_missing_backend_says_why_and_no_other_runs(fake):
    fake(first=True, missing=lambda: "needs a device of 2031")
    assert ops.backends() == {"fake": "needs a device of 2031"} | ops.backends()
    with pytest.raises(RuntimeError, match="fake: needs a device of 2031"):
        call(backend="fake")
    assert call().shape == (1, 4, 3)  # nobody asked for it, so the next one runs


def test_refused_call_says_why_and_no_other_runs(fake):
    fake(first=True, refuses=lambda device, dtype, search: f"not on {device.type}")
    with pytest.raises(RuntimeError, match=r"torch.float32 on cpu .*fake: not on cpu"):
        call(backend="fake")
    assert registry.choose(None, CPU, torch.float32, "auto").name != "fake"


def test_refusals_see_the_call(fake):
    seen = []
    fake(first=True, refuses=lambda *arguments: seen.append(arguments))
    assert registry.choose(None, CPU, torch.bfloat16, "exact").name == "fake"
    assert seen == [(CPU, torch.bfloat16, "exact")]


def test_the_first_that_can_is_preferred_and_used(fake):
    calls = []

    def match(*arguments):
        calls.append("match")
        return registry._BACKENDS["torch"].match(*arguments)

    fake(first=True, match=match)
    call()
    call(backend="torch")
    assert calls == ["match"]


@pytest.mark.parametrize("search", ["bf16", "int8", "fp8"])
def test_search_that_the_backend_lacks(search):
    with pytest.raises(RuntimeError, match=f"torch: .*no search='{search}'"):
        call(backend="torch", search=search)


def test_no_backend_lists_every_reason(fake):
    fake(refuses=lambda device, dtype, search: "of little faith")
    with pytest.raises(RuntimeError, match=r"search='fp8' \(.*torch: .*; .*fake: of little faith"):
        registry.choose(None, torch.device("meta"), torch.float32, "fp8")


def test_unknown_search():
    with pytest.raises(ValueError, match=r"search must be one of .*'fast'"):
        registry.choose(None, CPU, torch.float32, "fast")


def test_a_name_is_taken_once(fake):
    with pytest.raises(ValueError, match="'torch' is registered already"):
        ops.register_backend(registry._BACKENDS["torch"])


def test_a_fused_call_replaces_the_composition(fake):
    """``y`` is new memory out of place, ``x`` itself in place; the bank is ``x`` where none was given."""
    seen = []

    def fused(x, y, bank, references, alpha, threshold, keep, stats, mask, matching, search):
        seen.append((y is x, bank is x, stats))
        y.copy_(x + 1)

    fake(fused=fused)
    x, stats = torch.randn(2, 4, 3), torch.zeros(3, dtype=torch.int64)
    before = x.clone()
    assert torch.equal(ops.negtome(x, torch.randn(5, 3), backend="fake"), before + 1)
    assert torch.equal(x, before)
    ops.negtome_(x, torch.zeros(2, 1, dtype=torch.int32), 0.9, 0.0, stats=stats, backend="fake")
    assert torch.equal(x, before + 1)
    assert [entry[:2] for entry in seen] == [(False, False), (True, True)]
    assert seen[0][2] is None
    assert seen[1][2] is stats
