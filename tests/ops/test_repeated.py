"""Calls like an earlier one are neither checked nor given a backend again, until something changes that the choice rests on."""

import dataclasses
import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from negengine import ops
from negengine.ops import registry, repeated, verdicts
from negengine.reference import group_references

negtome = importlib.import_module("negengine.ops.negtome")  # the package has a function of this name


@pytest.fixture
def settled(monkeypatch):
    """How often a call was settled, also where the kernels are interpreted."""
    found, settle = [], negtome._settle
    monkeypatch.setattr(repeated, "applies", lambda x: True)
    monkeypatch.setattr(repeated, "_known", {})
    monkeypatch.setattr(negtome, "_settle", lambda call, backend: found.append(call) or settle(call, backend))
    return found


def call(x=None, **changed):
    x = torch.randn(3, 20, 16) if x is None else x
    given = {"references": group_references("first", len(x), len(x)), "alpha": 0.9, "threshold": -1.0} | changed
    with torch.no_grad():
        return ops.negtome_(x, **given)


def test_the_second_is_not_settled_and_is_computed(settled):
    for _ in range(3):
        x = torch.randn(3, 20, 16)
        expected = ops.negtome(x[1:], x[0], 0.9, -1.0)
        assert torch.equal(call(x.clone())[1:], expected)
    assert len(settled) == 1


CHANGES = {
    "tokens": {"x": torch.randn(3, 21, 16)},
    "dtype": {"x": torch.randn(3, 20, 16, dtype=torch.float64)},
    "counts": {"stats": torch.zeros(3, dtype=torch.int64)},
    "matching": {"matching": "release"},
    "search": {"search": "exact"},
    "backend": {"backend": "torch"},
    "promise": {"disjoint": True},
    "bank": {"bank": torch.randn(3, 20, 16)},
    "mask": {"mask": torch.ones(3, 20, dtype=torch.bool)},
    "dropped tokens": {"keep": torch.ones(3, 20, dtype=torch.bool)},
    "table": {"table": [-1, 0, 0]},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_call_is_settled(settled, what):
    call()
    call(**CHANGES[what])
    assert len(settled) == 2


@pytest.mark.parametrize("variable", repeated.SETTINGS)
def test_the_environment_is_followed(settled, monkeypatch, variable):
    call()
    monkeypatch.setenv(variable, "0" if variable == "NEGENGINE_TUNE" else "trust")
    call()
    assert len(settled) == 2


def test_a_new_backend_and_a_new_verdict_are_followed(settled):
    call()
    other = dataclasses.replace(registry._BACKENDS["torch"], name="other")
    with registry.registered(other):
        call()
    call()
    assert len(settled) == 3
    subject = verdicts.Subject(torch.device("cpu"), torch.float32, "auto", "paper")
    try:
        verdicts.remember(subject, verdicts.Verdict(False, "for a test"))
        call()
        verdicts.pin()
        call()
        verdicts.unpin()
        call()
    finally:
        verdicts.forget()
    assert len(settled) == 6


def test_bad_input_is_refused_as_elsewhere(settled):
    """Each time, also where a good call of that kind was settled before."""
    for _ in range(2):
        with pytest.raises(TypeError, match="references must be int32"):
            call(references=torch.zeros(3, 1, dtype=torch.int64))
        with pytest.raises(ValueError, match="unknown backend 'cuda13'"):
            call(backend="cuda13")
        with pytest.raises((TypeError, AttributeError)):
            call(mask=[True])
        call()
    assert len(settled) == 7


def test_what_is_settled_does_not_add_up(settled, monkeypatch):
    monkeypatch.setattr(repeated, "MOST", 3)
    for tokens in range(1, 9):
        call(torch.randn(2, tokens, 16))
        assert len(repeated._known) <= 3


def test_a_table_on_the_cpu_is_compared_with_what_is_said_about_it(settled):
    """Also that of a call like one before, whose table has been overwritten since."""
    references = group_references("first", 3, 3)
    said = {"references": references, "table": references.flatten().tolist(), "disjoint": True}
    for _ in range(2):
        call(**said)
    assert len(settled) == 1
    references.fill_(1)
    with pytest.raises(ValueError, match="table must hold the entries of references"):
        call(**said)
    with pytest.raises(ValueError, match="both has a reference and is one"):
        call(references=references, disjoint=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_what_nobody_watches(monkeypatch, device):
    """Without gradients, outside of modes, traces and profiles; for a tensor of a GPU there is a stand-in."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", device == "cuda")
    monkeypatch.setattr(torch.Tensor, "is_cpu", device == "cpu")
    monkeypatch.setattr(repeated, "_interpreted", lambda: False)
    x, seen = torch.randn(2), []
    assert not repeated.applies(x)
    with torch.no_grad():
        assert repeated.applies(x)
        with torch.autograd.profiler.profile():
            assert not repeated.applies(x)
        with FlopCounterMode(display=False):
            assert not repeated.applies(x)
        torch.jit.trace(lambda y: seen.append(repeated.applies(y)) or y + 1, x, check_trace=False)
        assert seen
        assert not any(seen)
        assert not repeated.applies(torch.nn.Parameter(x))
        monkeypatch.setattr(repeated, "_interpreted", lambda: True)
        assert repeated.applies(x) == (device == "cuda")
