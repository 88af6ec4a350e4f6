"""Measuring every method: the cases work on both embedded pipelines, and time inside our doors is counted once."""

import time

import pytest

from negengine import models
from negengine.bench import methods
from negengine.diffusers.session import Session


@pytest.mark.parametrize("name", ["mnist-flux", pytest.param("mnist-sdxl", marks=pytest.mark.exhaustive)])
def test_every_case_runs(name, monkeypatch):
    preset = models.preset(name)
    monkeypatch.setattr(methods.models, "preset", lambda _: preset.__class__(**{**vars(preset), "steps": 2}))
    monkeypatch.setattr(methods, "PROMPTS", 1)
    monkeypatch.setattr(methods, "IMAGES", 2)
    rows = methods.measure_methods(name, "cpu", 1)
    labels = [row["method"] for row in rows]
    assert labels[0] == "without"
    assert set(labels) >= set(methods.cases(name))
    for row in rows:
        inside = row["inside"]
        assert (inside is None) == row["method"].startswith("without")
        assert inside is None or 0 < inside < row["median"]


class Inner:
    def leave(self, x):
        return Session.leave(self, x)


def test_a_door_within_a_door_counts_once(monkeypatch):
    monkeypatch.setattr(Session, "leave", lambda self, x: time.sleep(0.02))
    monkeypatch.setattr(Session, "enter", lambda self, x: (time.sleep(0.02), self.leave(x)))
    before = Session.enter
    with methods.counted() as spent:
        Session.enter(Inner(), None)
    assert 0.039 < spent[0] < 0.075
    assert Session.enter is before
