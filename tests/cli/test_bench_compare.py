"""``negengine bench compare`` and ``negengine bench operator``, as a user types them."""

import importlib

import pytest
import torch
from samples import document, operator_row, written
from typer.testing import CliRunner

from negengine.bench import suite
from negengine.bench.ceilings import Ceilings
from negengine.bench.results import Results, read
from negengine.cli import app

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture
def files(tmp_path):
    """Two files of three variants; ``change`` makes the second."""
    rows = [operator_row(), operator_row("lean", 0.02), operator_row("release", 0.04)]
    old, new = tmp_path / "old.json", tmp_path / "new.json"

    def make(median=0.01, **changes):
        written(old, document("operator", rows))
        written(new, document("operator", [operator_row(median=median), *rows[1:]], **changes))
        return old, new

    return make


def test_the_same_twice(files):
    result = run("compare", *files())
    assert result.exit_code == 0, result.output
    assert result.output.endswith("0 slower, 0 faster, 3 the same\n")


def test_a_slowdown_is_shown_and_fails(files):
    result = run("compare", *files(median=0.012))
    assert result.exit_code == 1
    assert [line.split() for line in result.output.splitlines() if "cpu auto" in line] == [
        ["cpu", "auto", "10", "ms", "12", "ms", "+20.0%", "slower"]
    ]
    assert result.output.endswith("1 slower, 0 faster, 2 the same\n")


def test_a_larger_threshold_lets_it_pass(files):
    assert run("compare", *files(median=0.012), "--threshold", 0.25).exit_code == 0


def test_what_is_faster_does_not_fail(files):
    result = run("compare", *files(median=0.008), "--ratios")
    assert result.exit_code == 0
    assert "0.250      0.200     -20.0%   faster" in result.output
    assert "release" not in result.output


def test_a_slower_rival_fails_unless_only_ours_are_compared(files):
    old, new = files()
    written(new, document("operator", [operator_row(), operator_row("lean", 0.03), operator_row("release", 0.04)]))
    assert run("compare", old, new).exit_code == 1
    assert run("compare", old, new, "--role", "ours").exit_code == 0


def test_what_only_one_file_has_and_what_differs_is_told(files):
    old, new = files(date="2026-12-01")
    written(old, document("operator", [operator_row(), operator_row("gone"), operator_row("gone too")]))
    lines = run("compare", old, new).output.splitlines()
    assert "only in the old file: sdxl-32 bf16 paper half: gone, gone too" in lines
    assert "only in the new file: sdxl-32 bf16 paper half: lean, release" in lines
    assert "differs: date 2026-11-26 and 2026-12-01" in lines


def test_names_are_no_markup(files):
    old, new = files()
    for path in (old, new):
        written(path, document("operator", [operator_row("[red]x", case="/a[b]/c")]))
    output = run("compare", old, new).output
    assert "/a[b]/c" in output
    assert "[red]x" in output


def test_another_machine_is_refused_or_said(files):
    old, new = files(median=0.02, machine=document("", [])["machine"] | {"processor": "Another"})
    refused = run("compare", old, new)
    assert refused.exit_code == 2
    assert refused.output == "error: the files were measured on different machines: processor A processor and Another\n"
    told = run("compare", old, new, "--same-machine-only")
    assert told.exit_code == 0
    assert told.output.startswith("not compared: the files were measured on different machines: processor")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "new.json: No such file or directory"),
        ("{", "new.json is not JSON"),
        (document("operator", [], schema=7), "has schema 7; this version of negengine reads schema 1"),
        (document("operator", [operator_row(median=-1)]), "rows[0].median (sdxl-32 bf16 paper half, cpu auto): -"),
        (document("guidance", [operator_row()]), "different studies: 'operator' and 'guidance'"),
        (document("operator", [operator_row("other")]), "no row in common"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--same-machine-only"]])
def test_what_cannot_be_compared_is_one_line(files, content, message, options):
    old, new = files()
    new.unlink()
    if content is not None:
        written(new, content)
    result = run("compare", old, new, *options)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1


@pytest.fixture
def quick(monkeypatch):
    """Neither peaks, nor memory, nor a compiler that has nothing to compile: these take seconds whatever the shape."""
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(suite.ceilings_, "reading", lambda device: (Ceilings({}, 1e10), {}))
    monkeypatch.setattr(suite, "growth", lambda *_, **__: {})


def test_the_operator_is_measured_compared_and_shown(tmp_path, quick):
    command = ["operator", "--output", tmp_path / "a" / "b", "--shape", "2x16x8", "--rounds", 1, "--dtype", "fp32"]
    result = run(*command, "--matching", "paper")
    assert result.exit_code == 0, result.output
    assert "2x16x8 fp32 paper half: " in result.output
    assert "left out:\n2x16x8 fp32 paper half: release + compile" in result.output
    path = tmp_path / "a" / "b" / "operator.json"
    assert result.output.endswith(f"wrote {path}\n")
    found = read(path)
    assert {row["case"] for row in found["rows"]} == {"2x16x8 fp32 paper half"}
    assert {row["rounds"] for row in found["rows"]} == {1}
    ours = {row["variant"] for row in found["rows"] if row["role"] == "ours"}  # more of them where the processor has more
    assert ours
    assert {row["variant"] for row in found["rows"]} - ours >= {"release", "lean", "gemm"}
    assert not any("compile" in row["variant"] for row in found["rows"])
    assert run("compare", path, path, "--ratios").exit_code == 0
    assert run(*command).exit_code == 0
    assert {row["matching"] for row in read(path)["rows"]} == {"paper", "release"}  # the file was begun anew


def test_rivals_under_a_compiler_can_be_left_out(tmp_path, monkeypatch):
    seen = []

    def measure(case, device, rounds):
        seen.append(case.choice)
        return suite.Measured([], {}, {})

    monkeypatch.setattr(suite, "measure", measure)
    command = ["operator", "--output", tmp_path, "--shape", "sdxl-32", "--dtype", "bf16", "--matching", "paper"]
    assert run(*command, "--no-compile").exit_code == 0
    assert run(*command).exit_code == 0
    assert [choice.get("skip", ()) for choice in seen] == [("release + compile", "lean + compile")] + [()] * 5
    result = run(*command, "--no-compile")
    assert "sdxl-32 bf16 paper half: release + compile; sdxl-32 bf16 paper half: lean + compile\n    --no-compile" in result.output


def test_nothing_is_measured_on_another_machine_than_that_of_a_file(tmp_path, quick):
    command = ["operator", "--output", tmp_path / "new", "--shape", "2x16x8", "--rounds", 1, "--same-machine-as"]
    here = Results(tmp_path / "here.json", "operator")
    here.add([])
    assert run(*command, here.path).exit_code == 0
    assert read(tmp_path / "new" / "operator.json")["rows"]
    here.document["machine"]["processor"] = "Another"
    here.add([])
    result = run(*command, here.path)
    assert result.exit_code == 0
    assert "nothing measured that could be compared" in result.output
    assert "processor Another and " in result.output
    assert not read(tmp_path / "new" / "operator.json")["rows"]
    compared = run("compare", here.path, tmp_path / "new" / "operator.json", "--same-machine-only")
    assert (compared.exit_code, compared.output.startswith("not compared: ")) == (0, True)
    assert run(*command, tmp_path / "nothing.json").exit_code == 2


@pytest.mark.long
@pytest.mark.exhaustive
def test_the_smallest_shape_is_measured(tmp_path):
    result = run("operator", "--output", tmp_path, "--shape", "sdxl-32", "--rounds", 1, "--dtype", "bf16", "--matching", "paper")
    assert result.exit_code == 0, result.output
    found = read(tmp_path / "operator.json")
    assert {row["gate"] for row in found["rows"]} == {"half", "all", "none"}
    assert "release + compile" in {row["variant"] for row in found["rows"]}
    assert [check["case"] for check in found["checks"]] == [f"sdxl-32 bf16 paper {gate}" for gate in ("half", "all", "none")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "sdxl"], "unknown shape 'sdxl'; there are sdxl-32, "),
        (["--shape", "sdxl-32", "--shape", "4x0x8"], "unknown shape '4x0x8'"),
        (["--dtype", "float32"], "--dtype float32: on this device"),
        (["--matching", "best"], "--matching best: on this device"),
    ],
)
def test_bad_names_of_the_operator_s_study(tmp_path, arguments, message):
    result = run("operator", "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "measure", lambda *_: pytest.fail("measured"))
    written(tmp_path / "file", "")
    result = run("operator", "--output", tmp_path / "file")
    assert result.exit_code == 2
    assert "File exists" in result.output


def test_cases_are_those_of_the_names(monkeypatch):
    command = importlib.import_module("negengine.cli.bench.operator")
    monkeypatch.setattr(command, "DEVICE", "cpu")

    def names(*arguments):
        return [case.name for case in command.chosen(*arguments)]

    assert names([], [], [], False) == [case.name for case in suite.cases("cpu", False)]
    assert names([], [], [], True) == [case.name for case in suite.cases("cpu", True)]
    assert names(["flux-1024", "flux-1024"], ["bf16"], [], False) == ["flux-1024 bf16 paper half", "flux-1024 bf16 release half"]
    smallest = [f"sdxl-32 bf16 paper {gate}" for gate in ("half", "all", "none")]
    assert names(["sdxl-32"], ["bf16"], ["paper"], False) == smallest
    assert all(case.dtype == torch.float32 for case in command.chosen([], ["fp32"], [], False))
