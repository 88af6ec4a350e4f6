"""The driver of a run on a machine with a GPU, with sections that stand in for those that need one."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from typer.testing import CliRunner

from negengine.cli import app

TESTS = Path(__file__).parents[1]
SCRIPT = TESTS.parent / "bench" / "gpu.py"
spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
gpu = importlib.util.module_from_spec(spec)
sys.modules["gpu_run"] = gpu  # dataclasses look their module up
spec.loader.exec_module(gpu)


def section(name, *programs, limit=20.0, unless=None):
    return gpu.Section(name, tuple((sys.executable, "-S", "-c", program) for program in programs), limit, unless=unless)


def fine(name, **settings):
    return section(name, f"print('{name} says so')", **settings)


FAILS = section("fails", "print('about to fail'); raise SystemExit(3)")
HANGS = section("hangs", "import time; print('hangs now', flush=True); time.sleep(60)", limit=1.0)
KILLED = section("killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)


def packed(results):
    with tarfile.open(results / gpu.ARCHIVE) as archive:
        return {member.name: archive.extractfile(member).read().decode() for member in archive.getmembers()}


def test_a_section_that_fails_hangs_or_is_killed_costs_the_others_nothing(tmp_path):
    run = gpu.Run("fast", 60, tmp_path)
    assert not run.all([fine("first"), FAILS, HANGS, KILLED, fine("last")])
    found = {outcome.name: (outcome.status, outcome.reason) for outcome in run.outcomes}
    assert found == {
        "first": ("passed", ""), "fails": ("failed", "exit code 3"), "hangs": ("out of time", ""),
        "killed": ("failed", "signal SIGKILL"), "last": ("passed", ""),
    }  # fmt: skip
    record = json.loads((tmp_path / gpu.RECORD).read_text())
    assert [done["status"] for done in record["sections"]] == ["passed", "failed", "out of time", "failed", "passed"]
    files = packed(tmp_path)
    assert {name for name in files if "/logs/" in name} == {
        f"results/logs/{number:02}-{name}.log" for number, name in enumerate(found, 1)
    }
    assert "about to fail" in files["results/logs/02-fails.log"]
    assert "time.sleep" in files["results/logs/03-hangs.log"] or 'File "<string>"' in files["results/logs/03-hangs.log"]
    assert "did not pass: fails, hangs, killed" in files["results/summary.txt"]
    assert json.loads(files["results/run.json"]) == record
    assert len(list(tmp_path.iterdir())) <= gpu.MOST_FILES
    assert not list(tmp_path.glob("*.part"))


def test_what_a_case_wrote_is_packed_although_its_section_hangs(tmp_path):
    program = f"import pathlib, time; pathlib.Path({str(tmp_path / 'operator.json')!r}).write_text('a case'); time.sleep(60)"
    gpu.Run("fast", 60, tmp_path).all([section("measures", program, limit=1.0)])
    assert packed(tmp_path)["results/operator.json"] == "a case"


def test_all_passed(tmp_path):
    assert gpu.Run("fast", 60, tmp_path).all([fine("one"), fine("two")])
    assert "all passed" in (tmp_path / gpu.SUMMARY).read_text()


def test_what_replaces_a_section_runs_only_if_that_did_not_pass(tmp_path):
    run = gpu.Run("fast", 60, tmp_path)
    run.all([FAILS, fine("instead", unless="fails"), fine("good"), fine("not instead", unless="good")])
    assert [outcome.status for outcome in run.outcomes] == ["failed", "passed", "passed", "not needed"]
    assert "instead says so" in packed(tmp_path)["results/logs/02-instead.log"]


def test_the_clock_ends_a_section_and_leaves_out_the_rest(tmp_path):
    run, begun = gpu.Run("fast", 2.0, tmp_path), time.monotonic()
    assert not run.all([section("long", "import time; time.sleep(60)", limit=50), fine("later")])
    assert time.monotonic() - begun < 6
    assert [(outcome.status, outcome.reason) for outcome in run.outcomes] == [("out of time", ""), ("left out", "no time was left")]


def test_commands_of_a_section_run_at_the_same_time(tmp_path):
    """Each waits for the other's file."""
    wait = "import pathlib; p = pathlib.Path({!r}); (p / '{}').touch()\nwhile not (p / '{}').exists(): pass\nprint('met')"
    pair = section("pair", wait.format(str(tmp_path), "a", "b"), wait.format(str(tmp_path), "b", "a"))
    log = tmp_path / "log"
    assert gpu.execute(pair.commands, 20, {}, log) == [0, 0]
    assert sorted(log.read_text().split("\n")[:2]) == ["[0] met", "[1] met"]


def test_what_a_section_started_ends_with_it(tmp_path):
    child = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    log = tmp_path / "log"
    gpu.execute(section("parent", f"{child}; import time; time.sleep(60)", limit=1.0).commands, 1.0, {}, log)
    pid = int(log.read_text().splitlines()[0])
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it runs on")


@pytest.mark.parametrize(
    "codes, status",
    [
        ([0, 0], ("passed", "")),
        ([0, 5], ("passed", "")),
        ([5, 5], ("failed", "no test was collected")),
        ([0, 1], ("failed", "exit code 1")),
        ([-11, 0], ("failed", "signal SIGSEGV")),
        ([None, 1], ("out of time", "1 of 2 processes ran into the limit")),
    ],
)
def test_exit_codes(codes, status):
    assert gpu.judged(codes) == status


def test_a_run_that_is_asked_to_end_packs_what_it_has(tmp_path):
    results = tmp_path / "results"
    program = (
        f"import importlib.util, sys, pathlib, signal\n"
        f"spec = importlib.util.spec_from_file_location('gpu_run', {str(SCRIPT)!r})\n"
        f"gpu = importlib.util.module_from_spec(spec); sys.modules['gpu_run'] = gpu; spec.loader.exec_module(gpu)\n"
        f"signal.signal(signal.SIGTERM, gpu._stop)\n"
        f"def s(name, text): return gpu.Section(name, ((sys.executable, '-S', '-c', text),), 50)\n"
        f"run = gpu.Run('fast', 60, pathlib.Path({str(results)!r}))\n"
        f"run.all([s('done', 'print(1)'), s('waits', 'import time; print(2, flush=True); time.sleep(50)')])"
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running = results / gpu.RUNNING
    for _ in range(400):
        if running.exists() and running.read_bytes() == b"2\n":
            break
        time.sleep(0.05)
    process.terminate()
    assert b"Stopped: SIGTERM" in process.communicate(timeout=20)[1]
    assert process.returncode != 0
    files = packed(results)
    assert "results/logs/01-done.log" in files
    assert files["results/running.log"] == "2\n"
    assert "Stopped SIGTERM" in files["results/summary.txt"]


@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_has_sections_whose_files_are_there(part, tmp_path):
    sections = gpu.Plan(tmp_path, jobs=2).sections(part)
    assert sections
    assert len({s.name for s in sections}) == len(sections)
    for s in sections:
        assert s.unless is None or s.unless in [other.name for other in sections[: sections.index(s)]]
        for command in s.commands:
            files = [a for a in command if a.startswith(("tests/", "bench/"))]
            modules = [SCRIPT.parents[1] / a.replace(".", "/") for a in command if a.startswith("negengine.")]
            assert files or modules
            assert all((SCRIPT.parents[1] / file).exists() for file in files)
            assert all(module.with_suffix(".py").exists() or (module / "__main__.py").exists() for module in modules)


def test_whole_models_are_measured_eager_before_compiled(tmp_path):
    """Of each the command accepts what it is given: it is rehearsed."""
    sections = gpu.Plan(tmp_path, jobs=2).sections("models")
    assert [("--compiled" in s.commands[0]) for s in sections] == [False, False, True, True]
    for s in sections:
        command = list(s.commands[0])
        result = CliRunner().invoke(app, [*command[3:], "--rehearse"])
        assert result.exit_code == 0, result.output
        assert "4 images of 1024 x 1024" in result.output


def test_the_fast_part_begins_with_the_shape_that_matters_most(tmp_path):
    first, *_ = gpu.Plan(tmp_path, jobs=2).sections("fast")
    assert first.commands[0][2:4] == ("negengine.bench.calls", "flux-1024")


def test_a_folder_that_holds_a_run_is_refused(tmp_path, capsys):
    (tmp_path / gpu.RECORD).write_text("{}")
    with pytest.raises(SystemExit):
        gpu.main(["fast", "--results", str(tmp_path)])
    assert "holds a run already; remove it or name another folder" in capsys.readouterr().err


def test_shards_take_every_test_once(request):
    """By the option of the tests' own configuration."""
    (own,) = (m for m in request.config.pluginmanager.get_plugins() if getattr(m, "__file__", "") == str(TESTS / "conftest.py"))
    tests, shares = [MagicMock(**{"get_closest_marker.return_value": None}) for _ in range(10)], []
    for number in range(3):
        config, items = MagicMock(), list(tests)
        config.getoption.return_value = f"{number}/3"
        own.pytest_collection_modifyitems(config, items)
        shares.append([tests.index(item) for item in items])
        left_out = config.hook.pytest_deselected.call_args.kwargs["items"]
        assert [item for item in tests if item not in items] == left_out
    assert shares == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
