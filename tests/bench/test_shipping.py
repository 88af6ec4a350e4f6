"""Verdicts that come with the package are those that were measured, on these very sources."""

import dataclasses
import json

import pytest

from negengine.bench import verdicts as measured
from negengine.ops import verdicts


def row(kind_of, **changes):
    key = verdicts.Key("a GPU", "9.0", 132, "1.2", "2.11", "3.6", verdicts.fingerprint(), "bfloat16", "exact", "paper")
    key = dataclasses.asdict(dataclasses.replace(key, **changes))
    return {"dtype": "bfloat16", "search": "exact", "key": key, "verdict": kind_of.to_json()}


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "SHIPPED", tmp_path / "proven.json")

    def ship(*rows):
        (tmp_path / "verdicts.json").write_text(json.dumps({"rows": rows}))
        measured.ship(tmp_path)
        return json.loads(verdicts.SHIPPED.read_text())["verdicts"] if verdicts.SHIPPED.exists() else {}

    return ship


PROVEN = verdicts.Verdict(True, cases=3, speeds=(verdicts.Speed((4, 64, 64, 64), 1.0, 2.0, True),))


def test_for_any_driver_and_both_names_of_the_search(shipped):
    found = shipped(row(PROVEN))
    assert {(entry["key"]["search"], entry["key"]["driver"]) for entry in found.values()} == {("exact", "any"), ("auto", "any")}


def test_what_decided_nothing_or_was_wrong_stays_out(shipped):
    assert shipped(row(verdicts.Verdict(True, cases=3)), row(verdicts.Verdict(False, "a fault", 1))) == {}


def test_other_sources_are_refused(shipped):
    with pytest.raises(ValueError, match="is on the sources older; measure these anew"):
        shipped(row(PROVEN, kernels="older"))
