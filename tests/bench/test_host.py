"""The measuring of the host's cost: what is left out and what is not, turns of two states of the code, rows."""

import contextlib
from pathlib import Path

import pytest
import torch
from negengine.kernels.cpu import library

import negengine
from negengine.bench import host
from negengine.bench.results import Results, read
from negengine.ops import cpu, registry

pytestmark = pytest.mark.skipif(library.missing() is not None, reason="no native library")
CALLS = (
    "hook, inactive",
    "negtome_, tensors",
    "nag_",
    "guide",
    "evidence",
    "NAG, a block",
    "DNG, the prediction",
    "DNG, the update",
)


@pytest.fixture(scope="module")
def subject():
    return host.Subject("flux", "cpu")


@pytest.mark.parametrize(
    "variant, merged, launched, run",
    [
        (host.RESTING, 0, 0, 0),
        (host.HOOK, 0, 0, 0),
        (host.EFFECT, 8, 0, 0),
        (host.OPERATOR, 8, 8, 0),
        (host.BACKEND, 8, 8, 8),
    ],
)
def test_each_variant_ends_where_it_says(subject, monkeypatch, variant, merged, launched, run):
    """How often the method, the operator and the backend are asked in a forward of 8 merging blocks."""
    asked = {"method": 0, "operator": 0, "backend": 0}

    def counting(owner, name, what):
        usual = getattr(owner, name)

        def call(*arguments, **named):
            asked[what] += 1
            return usual(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    counting(negengine.diffusers.effects.EFFECTS[negengine.NegToMe], "tokens", "method")
    counting(negengine.ops, "negtome_", "operator")
    counting(cpu, "_problem", "backend")
    with torch.no_grad(), subject.put(variant):
        assert len(subject._hooks_timed(empty=False)) == subject.blocks == 8
    assert asked == {"method": merged, "operator": launched, "backend": run}
    assert registry._BACKENDS["cpu"].run is cpu._run
    with pytest.raises(ValueError, match="no method is applied"):
        negengine.status(subject.denoiser)


def test_an_empty_hook_is_the_clock_alone(subject, monkeypatch):
    with torch.no_grad(), subject.put(host.EMPTY):
        subject.forward()
        monkeypatch.setattr(host.Session, "tokens", lambda *_: pytest.fail("heard"))
        assert max(subject._hooks_timed(empty=True)) > 0


def test_every_case_is_measured_and_told(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "CALLS", 2)
    found = host.measure("cpu", rounds=2)
    assert {row["case"] for row in found} == {*host.DENOISERS, host.IN_A_ROW}
    for name in host.DENOISERS:
        assert [row["part"] for row in found if row["case"] == name] == [host.EMPTY, *host.PARTS]
    assert {*CALLS} <= {row["part"] for row in found if row["case"] == host.IN_A_ROW}
    assert all(0 < row["least"] <= row["p10"] <= row["median"] <= row["p90"] < 1 for row in found)
    results = Results(tmp_path / "host.json", "host")
    results.add(found)
    assert read(results.path)["rows"] == found
    assert len(host.table(found).splitlines()) == len(found)


def answering(monkeypatch, code):
    """Processes that answer 1 and 3 us for the code before, 2 us for that of now; and in which order they were asked."""
    asked = []

    @contextlib.contextmanager
    def process(checkout, device):
        name = host.BEFORE if checkout == Path("older") else host.NOW
        numbers = iter([1e-6, 1e-6, 3e-6] if name == host.BEFORE else [2e-6] * 3)

        def ask():
            asked.append(name)
            if asked.count(name) == 1:
                return {"code": code if name == host.BEFORE else "", "blocks": {"flux": 8}}
            return {"flux": {host.HOOK: next(numbers)}}

        yield ask

    monkeypatch.setattr(host, "process", process)
    return asked


def test_two_states_of_the_code_take_turns(monkeypatch):
    asked = answering(monkeypatch, str(Path("older").resolve() / "negengine" / "__init__.py"))
    found = host.measure("cpu", rounds=2, before=Path("older"))
    assert asked == [host.BEFORE, host.NOW] * 4  # what they are, a round to warm up, two rounds
    assert [(row["variant"], row["code"], row["median"], row["least"], row["rounds"]) for row in found] == [
        ("hook, before", "before", pytest.approx(2e-6), 1e-6, 2),
        ("hook", "now", 2e-6, 2e-6, 2),
    ]


def test_another_code_than_that_of_the_checkout_is_an_error(monkeypatch):
    answering(monkeypatch, "/elsewhere/negengine/__init__.py")
    with pytest.raises(RuntimeError, match=r"should be that of older, but /elsewhere/negengine/__init__\.py was imported"):
        host.measure("cpu", rounds=2, before=Path("older"))


@pytest.mark.exhaustive
def test_a_process_measures_the_code_of_its_checkout():
    root = Path(negengine.__file__).parents[1]
    with host.process(root, "cpu") as ask:
        assert Path(ask()["code"]).is_relative_to(root)
        assert set(ask()) == {*host.DENOISERS, host.IN_A_ROW}


def test_a_process_that_fails_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"measuring the code of .* failed"), host.process(tmp_path, "no-device") as ask:
        ask()
