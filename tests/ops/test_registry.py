"""A backend that is asked for runs, or says why it cannot; never another one in its place."""

import dataclasses

import pytest
import torch
from negengine.kernels.call import Call

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

    def run(call):
        calls.append(call)
        registry._BACKENDS["torch"].run(call)

    fake(first=True, run=run)
    call()
    call(backend="torch")
    assert len(calls) == 1


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


def test_a_backend_can_be_registered_for_a_while():
    """It is gone afterwards, also after an error; a second of that name does not displace the first."""
    before, guest = ops.backends(), dataclasses.replace(registry._BACKENDS["torch"], name="guest")
    with registry.registered(guest):
        with pytest.raises(ValueError, match="registered already"), registry.registered(dataclasses.replace(guest)):
            pass
        assert registry._BACKENDS["guest"] is guest
    with pytest.raises(RuntimeError, match="on purpose"), registry.registered(guest):
        raise RuntimeError("on purpose")
    assert ops.backends() == before


def test_what_a_backend_is_given(fake):
    """``y`` is new memory out of place, ``x`` itself in place; the bank is ``x`` where none was given."""
    seen = []

    def run(call):
        seen.append(call)
        call.y.copy_(call.x + 1)

    fake(run=run)
    x, stats = torch.randn(2, 4, 3), torch.zeros(3, dtype=torch.int64)
    before = x.clone()
    assert torch.equal(ops.negtome(x, torch.randn(5, 3), backend="fake"), before + 1)
    assert torch.equal(x, before)
    table = torch.tensor([[-1], [0]], dtype=torch.int32)
    ops.negtome_(x, table, 0.9, 0.0, stats=stats, backend="fake", disjoint=True, table=[-1, 0])
    assert torch.equal(x, before + 1)
    ops.negtome_(x, table, 0.9, 0.0, bank=torch.randn(1, 4, 3), backend="fake", disjoint=True)
    assert [call.y is call.x for call in seen] == [False, True, True]
    assert [call.bank is call.x for call in seen] == [False, True, False]
    assert [call.table for call in seen] == [[0, 0], [-1, 0], None]
    assert [call.disjoint for call in seen] == [False, True, False]  # the promise says nothing about a bank
    assert seen[0].stats is None
    assert seen[1].stats is stats
    assert seen[2].entries() == [-1, 0]


def test_the_entries_of_a_table_for_each_image_are_known_without_reading_it(fake):
    seen = []
    fake(run=seen.append)
    x = torch.randn(3, 4, 2)
    ops.negtome(x, x, backend="fake")
    assert seen[0].table == [0, 1, 2]


# --- who is chosen where nobody is named ------------------------------------------------------------------------


def test_a_backend_that_defers_runs_where_it_is_named_or_nobody_else_can(fake, monkeypatch):
    asked = []

    def defers(call):
        asked.append(call)
        return "has other things to do"

    fake(first=True, defers=defers)
    given = Call(torch.randn(1, 4, 3), torch.randn(1, 5, 3), torch.zeros(1, 1, dtype=torch.int32), None, "paper", "auto")
    names = (CPU, torch.float32, "auto")
    assert registry.choose(None, *names, given).name not in ("fake", None)
    assert asked == [given]
    assert registry.choose("fake", *names, given).name == "fake"
    assert registry.choose(None, *names).name == "fake"  # without a call nobody is asked
    assert asked == [given]
    monkeypatch.setattr(registry, "_BACKENDS", {"fake": registry._BACKENDS["fake"]})
    assert registry.choose(None, *names, given).name == "fake"


def test_of_backends_that_all_defer_the_first_runs(fake, monkeypatch):
    fake(first=True, defers=lambda call: "not I")
    later = dataclasses.replace(registry._BACKENDS["fake"], name="later")
    refusing = dataclasses.replace(registry._BACKENDS["torch"], name="refusing", refuses=lambda *call: "cannot")
    found = {b.name: b for b in (refusing, registry._BACKENDS["fake"], later)}
    monkeypatch.setattr(registry, "_BACKENDS", found)
    given = Call(torch.randn(1, 4, 3), torch.randn(1, 5, 3), torch.zeros(1, 1, dtype=torch.int32), None, "paper", "auto")
    assert registry.find(None, CPU, torch.float32, "auto", given) == (found["fake"], ["refusing: cannot"])


def test_a_call_asks_who_defers(fake):
    """The operators hand the call over, and take the next backend."""
    ran = []
    fake(first=True, defers=lambda call: "sees x of four tokens" if call.x.shape[1] == 4 else None, run=ran.append)
    call()
    assert not ran
    ops.negtome(torch.randn(1, 6, 3), torch.randn(5, 3))
    assert len(ran) == 1


def test_the_order_of_preference():
    assert list(registry._BACKENDS)[:3] == ["cpu", "triton", "torch"]


def test_triton_defers_on_cpus():
    given = Call(torch.randn(1, 4, 3), torch.randn(1, 5, 3), torch.zeros(1, 1, dtype=torch.int32), None, "paper", "auto")
    assert registry._BACKENDS["triton"].defers(given) == "on CPUs it is Triton's interpreter, which is for tests"
