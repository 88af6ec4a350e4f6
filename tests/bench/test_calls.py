"""Cases in processes of their own: files that are added to, variants that fail, shapes by name."""

import json

import pytest
import torch

from negengine.bench import calls, rivals, suite
from negengine.bench import ceilings as ceilings_
from negengine.bench.ceilings import Ceilings
from negengine.bench.results import Results
from negengine.bench.shapes import SHAPES, Shape, shape_named
from negengine.bench.suite import Case


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ceilings_, "reading", lambda device: (Ceilings({"bf16": 100.0}, 1e10), {}))
    monkeypatch.setattr(suite, "growth", lambda *arguments, **choice: {})


def run(tmp_path, *arguments):
    return calls.main(
        ["3x24x16", "--device", "cpu", "--rounds", "1", "--backends", "torch", "--results", str(tmp_path), *arguments]
    )


def test_cases_of_several_processes_share_a_file(tmp_path):
    assert run(tmp_path) == run(tmp_path, "--gate", "all") == 0
    rows = json.loads((tmp_path / "operator.json").read_text())["rows"]
    assert list(dict.fromkeys(row["case"] for row in rows)) == ["3x24x16 bf16 paper half", "3x24x16 bf16 paper all"]
    assert {row["variant"] for row in rows} == {"torch auto", "release", "lean", "gemm"}


def test_a_variant_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(rivals, "lean", broken)
    assert run(tmp_path) == 1
    document = json.loads((tmp_path / "operator.json").read_text())
    assert {row["variant"] for row in document["rows"]} == {"torch auto", "release", "gemm"}
    failed = document["left_out"]["3x24x16 bf16 paper half: lean"]
    assert failed == "failed: RuntimeError: an illegal memory access was encountered"
    assert "lean failed: RuntimeError" in capsys.readouterr().out


def test_a_file_is_begun_anew_unless_it_is_added_to(tmp_path):
    for proceed, count in ((False, 1), (True, 2), (False, 1)):
        file = Results(tmp_path / "rows.json", "rows", proceed)
        file.add([{"a": 1}])
        assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == count


def test_failures_name_nothing_where_all_works():
    case = Case(Shape("small", 2, 8, 8), torch.bfloat16, choice={"compiled": False, "backends": ["torch"]})
    assert calls.failures(case, "cpu") == {}


def test_shapes_by_name():
    assert shape_named("flux-1024") is SHAPES["flux-1024"]
    assert shape_named("2x3x4") == Shape("2x3x4", 2, 3, 4)
    for bad in ("flux", "2x3", "2x0x4", "2x-3x4"):
        with pytest.raises(ValueError, match="unknown shape"):
            shape_named(bad)
