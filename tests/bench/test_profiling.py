"""Traces of an active and an inactive step: their ranges, the dearest operators, and that nothing of it stays."""

import contextlib
import json
import sys

import pytest
import torch

import negengine
from negengine import models
from negengine.bench import profiling, whole
from negengine.cli import app
from negengine.diffusers.apply import _of
from negengine.diffusers.families import find_denoiser

typer_testing = pytest.importorskip("typer.testing")

SETTING = whole.Setting(model="mnist-flux", images=2, steps=4, dtype=torch.float32)
STEP, OPERATOR = profiling.RANGE, "negengine::negtome_"


@pytest.fixture(scope="module")
def subject():
    return whole.checkpoint(SETTING, models.load(SETTING.model, SETTING.dtype), models.preset(SETTING.model).call_kwargs(1))


def names(path, kind="user_annotation"):
    return [event["name"] for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") == kind]


def test_a_trace_of_each_kind_of_step(subject, tmp_path):
    said = []
    hooks = [len(module._forward_pre_hooks) for module in subject.pipe.transformer.modules()]
    profiling.profile(SETTING, subject, tmp_path / "traces", said.append)
    active, inactive = (names(tmp_path / "traces" / f"trace-{kind}.json") for kind in ("active", "inactive"))
    sites = list(find_denoiser(subject.pipe)[1].tokens.sites(subject.pipe.transformer))
    merged = [name for name in active if name.endswith(", methods") and "enter" not in name]
    (number,) = {name.split(":")[0] for name in active}
    assert merged
    assert {name.removeprefix(f"{number}: ").removesuffix(", methods") for name in merged} <= {site.name for site in sites}
    assert all(name.removesuffix(", methods") in active for name in merged)
    (other,) = {name.split(":")[0] for name in inactive}
    assert other != number
    assert [name for name in inactive if name.endswith("methods") and "enter" not in name] == []
    assert len(inactive) > len(merged)  # the blocks are there as well
    assert f"{number}, active" in said[0]
    assert f"{other}, inactive" in said[2]
    tables = [text.splitlines()[1:] for text in (said[1], said[3])]
    for table in tables:
        assert len(table) == profiling.DEAREST
        assert not any(STEP in line for line in table)
        spent = [float(line.split()[-2]) for line in table]
        assert spent == sorted(spent, reverse=True)
    merges = [names(tmp_path / "traces" / f"trace-{kind}.json", "cpu_op").count(OPERATOR) for kind in ("active", "inactive")]
    assert merges == [len(merged), 0]
    assert [len(module._forward_pre_hooks) for module in subject.pipe.transformer.modules()] == hooks
    with pytest.raises(ValueError, match="no method is applied"):
        negengine.status(subject.pipe)


def test_a_loop_without_an_inactive_step_says_so(subject, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(whole.Variant, "acts", lambda variant, timestep: True)
    profiling.profile(SETTING, subject, tmp_path, said.append)
    assert said[-1].startswith("no trace of an inactive step")
    assert [path.name for path in tmp_path.iterdir()] == ["trace-active.json"]


def test_ranges_are_of_nvtx_too_and_go_when_a_loop_fails(subject, monkeypatch):
    opened = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", opened.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: opened.append("end"))
    negengine.apply(subject.pipe, negengine.NegToMe())
    try:
        (session,) = _of(subject.pipe.transformer)
        with contextlib.suppress(KeyError), profiling.ranges(subject.pipe, "step 7", nvtx=True):
            assert "tokens" in vars(session)
            raise KeyError
        assert opened == ["step 7", "end"]
        assert not {"enter", "tokens", "leave"} & set(vars(session))
    finally:
        negengine.remove(subject.pipe)


def test_on_the_command_line(subject, tmp_path, monkeypatch):
    """Nothing is timed, and nothing of profiling is imported without it."""
    asked = []
    monkeypatch.setattr(whole, "checkpoint", lambda *_: subject)
    monkeypatch.setattr(profiling, "profile", lambda setting, subject, folder, say: asked.append((setting.steps, folder)))
    monkeypatch.setattr(whole, "measure", lambda *_: pytest.fail("timed"))
    arguments = ["bench", "model", "--model", "mnist-flux", "--steps", "4", "--output", str(tmp_path / "out"), "--profile"]
    done = typer_testing.CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert asked == [(4, tmp_path / "out")]
    assert "negengine.bench.profiling" in sys.modules
