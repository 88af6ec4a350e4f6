"""What is said of a run beforehand is what the run does."""

import contextlib
import dataclasses
import importlib
import re

import pytest
import torch
from test_whole import narrow, run, setting  # noqa: F401

from negengine.bench import footprint as footprints
from negengine.bench import whole
from negengine.bench.architectures import ARCHITECTURES
from negengine.bench.look import duration
from negengine.bench.whole import METHODS, PUBLISHED, WITHOUT, plan, rehearsal, subject, turns
from negengine.bench.whole.candidates import planned
from negengine.bench.whole.plan import Costs, Plan
from negengine.bench.whole.setting import AGAIN
from negengine.bench.whole.subjects import sketch


def rehearsed(*settings):
    said = []
    return whole.rehearse(settings, said.append), said


def names(lines):
    """Of the variants in the order in which they take turns."""
    first = lines.index("  then in turn, a loop each:") + 1
    return [line.strip().rsplit(": ", 1)[0] for line in lines[first:] if line.startswith("    ")]


@pytest.mark.parametrize("changes", [{}, {"methods": METHODS}, {"searches": True, "compiled": ("blocks", "whole")}, {"steps": 2}])
def test_a_rehearsal_has_the_order_of_the_run(narrow, monkeypatch, changes):  # noqa: F811
    given = setting(**changes)
    fits, said = rehearsed(given)
    assert fits
    seen = []

    def loop(given, found, one):
        seen.append(one.variant.name)
        timesteps = ARCHITECTURES["flux-dev"].timesteps(given.size, given.steps)
        one.loops.append(turns.Loop(1.5, (1.0,) * given.steps, tuple(timesteps)))

    monkeypatch.setattr(turns, "_loop", loop)
    monkeypatch.setattr(whole.measuring, "prepared", lambda *_: contextlib.nullcontext())
    result = whole.measure(dataclasses.replace(given, rounds=1), subject(given))
    told = names(said)
    order = [WITHOUT if name == AGAIN else name for name in told]
    assert order == seen[-len(order) :]
    warm = [name for name in told if name != AGAIN]
    ways = [1, *(2 for _ in given.compiled)]
    assert seen == [name for loops in ways for name in (*(one for one in warm for _ in range(loops)), *order)]
    skipped = {line.split(": ")[1] for line in said if line.startswith("  left out: ")}
    assert skipped == {name.split(": ")[1].split(",")[0] for name in result.left_out}
    assert [line.split(",")[0].strip() for line in said if "to warm up" in line] == [
        "eager", *(f"compiled: {way}" for way in given.compiled)
    ]  # fmt: skip


@pytest.mark.parametrize("model, size, steps", [("flux-dev", 64, 3), ("flux-dev", 128, 4), ("sdxl-base", 512, 5)])
def test_timesteps_are_those_of_the_pipeline(narrow, model, size, steps):  # noqa: F811
    pipe = sketch(setting(model, size=size)).pipe
    seen = ARCHITECTURES[model].timesteps(size, steps)
    if model == "flux-dev":
        given = setting(model, size=size, steps=steps)
        found = subject(given)
        found.call()
        pipe = found.pipe
    else:
        pipe.scheduler.set_timesteps(steps)
    assert seen == pytest.approx(pipe.scheduler.timesteps.tolist())


@pytest.mark.parametrize(
    "model, rows", [("flux-dev", {"nag": 1, "dng": 1, "negtome": 0}), ("sdxl-base", {"nag": 0, "dng": 0.5, "negtome": 0})]
)
def test_joined_rows_are_counted(narrow, model, rows):  # noqa: F811
    given = setting(model, methods=tuple(rows))
    found = sketch(given)
    joined = {variant.methods[0].name: plan.joined(variant, found) for variant in planned(given, found)}
    assert joined == rows


def test_lengths_by_hand(narrow):  # noqa: F811
    given = setting(methods=("negtome", "nag"), compiled=("blocks",), rounds=5)
    found = sketch(given)
    timesteps = [1000.0, 950.0, 500.0]
    told = plan.plan(given, found, planned(given, found), timesteps, Costs(step=10, search=1, beside=2))
    assert told.loops == {WITHOUT: 32, AGAIN: 32, "cpu auto": 34, PUBLISHED: 34, "nag": 62}
    assert told.calibration == 13
    assert told.groups == [1, 2]
    assert told.warm_up == 3 * (32 + 34 + 34 + 62)
    assert told.least == 13 + told.warm_up + 2 * 32


def test_rounds_are_as_many_as_there_is_time_for():
    given = Plan({WITHOUT: 1.0, AGAIN: 1.0, "x": 1.0}, {}, 1.0, [1, 2])
    assert given.rounds(5, 100) == [5, 5]
    assert given.seconds(5, 100) == 1 + 6 + 10 * 3
    assert given.rounds(5, 1 + 2 + 7 + 4 + 4) == [5, 0]
    assert given.rounds(5, 9) == [2, 0]
    assert given.seconds(5, 9) == 1 + 6 + 2 * 3 + 1


def test_what_would_take_too_long_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "measured_rate", lambda *_: 0.6e12)
    monkeypatch.setattr(footprints, "free_bytes", lambda device: 1e12)
    monkeypatch.setattr(whole.measuring, "made", lambda *_: pytest.fail("something was made"))
    result = run("--depth", "2+2", "--images", 2, "--steps", 9, "--device", "cpu", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "compilation apart, and --seconds is 420; what fits: --depth 1+1, or --steps " in result.stderr
    assert not (tmp_path / "out").exists()
    changed = re.findall(r"(--steps|--size) (\d+)", result.stderr)
    assert [name for name, _ in changed] == ["--steps", "--size"]
    usual = whole.Setting("flux-dev", depth=(2, 2), images=2, steps=9)
    permitted = float(re.search(r"--seconds (\d+) permits", result.stderr)[1])
    for changes in (*({name.strip("-"): int(value)} for name, value in changed), {"seconds": permitted}):
        assert list(rehearsal.refusals([dataclasses.replace(usual, **changes)], 0.6e12)) == []
    for changes in ({"steps": int(changed[0][1]) + 1}, {"size": int(changed[1][1]) + 16}):
        assert len(list(rehearsal.refusals([dataclasses.replace(usual, **changes)], 0.6e12))) == 1


def test_the_issued_command_and_usual_runs_on_a_gpu_end_in_time(monkeypatch):
    monkeypatch.setattr(rehearsal, "there", lambda device: False)  # their memory is not looked at
    small = whole.Setting("flux-dev", depth=(2, 2), images=2, steps=4)
    assert list(rehearsal.refusals([small], 0.56e12)) == []
    for model, depth, steps in (("flux-dev", (19, 38), 25), ("sdxl-base", (2, 10), 50)):
        given = whole.Setting(model, depth=depth, images=4, steps=steps, device="cuda")
        assert list(rehearsal.refusals([given], plan.GPU_RATE)) == []


def test_several_cases_share_the_time(monkeypatch):
    monkeypatch.setattr(rehearsal, "there", lambda device: False)
    few = [whole.Setting("flux-dev", depth=(1, 1), size=size, images=2, steps=4) for size in (256, 512)]
    seconds = [plan._least(one, sketch(one), 0.56e12) for one in few]
    enough = [dataclasses.replace(one, seconds=1.01 * sum(seconds)) for one in few]
    assert list(rehearsal.refusals(enough, 0.56e12)) == []
    (reason,) = rehearsal.refusals([dataclasses.replace(one, seconds=0.9 * sum(seconds)) for one in few], 0.56e12)
    assert "fewer than these 2 cases" in reason


def test_a_checkpoint_s_steps_are_timed(narrow, monkeypatch):  # noqa: F811
    given = setting(steps=40, seconds=200)
    monkeypatch.setattr(plan, "timed_loop", lambda *_: turns.Loop(2.5, (2.0,), (1000.0,)))
    found = dataclasses.replace(sketch(given), architecture=None)
    with pytest.raises(ValueError, match=r"about 5 min, .* what fits: --steps 24; --seconds 386 permits it") as raised:
        whole.check_loaded(given, found)
    assert "--depth" not in str(raised.value)
    whole.check_loaded(dataclasses.replace(given, steps=24), found)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--images", 1), "would be refused: NegToMe would merge nothing in flux-dev with --images 1"),
        (("--size", 24), "would be refused: the size for flux-dev must be a positive multiple of 16 pixels, got 24"),
        (("--size", 64, "--steps", 9, "--seconds", 0), "and --seconds is 0"),
    ],
)
def test_a_rehearsal_says_what_the_run_would_refuse(narrow, arguments, message):  # noqa: F811
    result = run("--rehearse", "--device", "cpu", "--depth", "1+1", "--output", "nowhere", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_rehearsal_looks_at_the_memory(narrow, monkeypatch):  # noqa: F811
    monkeypatch.setattr(footprints, "free_bytes", lambda device: 1000)
    fits, said = rehearsed(setting())
    assert not fits
    assert said[-1].endswith("nothing of this model fits; free some memory")


def test_too_few_steps_are_said_in_a_rehearsal():
    _, said = rehearsed(whole.Setting("sdxl-base", depth=(1, 1), size=512, images=2, steps=3))
    assert names(said) == [WITHOUT, AGAIN]
    assert "  left out: published: acts in no step: its window is from 800 to 1000, the run's timesteps are 667, 334, 1; take" in (
        "\n".join(said)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_rehearsed_without_one():
    result = run("--rehearse", "--device", "cuda", "--searches", "--output", "nowhere")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[2] == "  a GPU with 24 GB: too little, 48 GB: fits, 80 GB: fits, 141 GB: fits"
    assert names(lines) == [WITHOUT, AGAIN, "triton auto", "triton fp8", "torch auto", PUBLISHED]
    assert "estimated on an H100 or H200" in lines[-1]


def test_libraries_are_quiet_before_any_of_them_is_used(monkeypatch):
    command, seen = importlib.import_module("negengine.cli.bench.model"), []
    monkeypatch.setattr(command, "quiet_libraries", lambda: seen.append("quiet"))
    monkeypatch.setattr(whole, "check_attention", lambda names: seen.append("attention"))
    monkeypatch.setattr(whole, "rehearse", lambda settings, say: seen.append("rehearsed") or True)
    assert run("--rehearse", "--output", "nowhere").exit_code == 0
    assert seen == ["quiet", "attention", "rehearsed"]


def test_an_embedded_model_needs_no_rehearsal():
    result = run("--rehearse", "--model", "mnist-flux", "--output", "nowhere")
    assert (result.exit_code, "embedded and small" in result.output) == (0, True)
    result = run("--rehearse", "--model", "black-forest-labs/FLUX.1-dev", "--output", "nowhere")
    assert (result.exit_code, "only flux-dev and sdxl-base can be rehearsed" in result.output) == (2, True)


@pytest.mark.parametrize(
    "value, text",
    [(0.25, "250 ms"), (4.2, "4.2 s"), (42, "42 s"), (99.4, "99 s"), (150, "2 min"), (5900, "98 min"), (9000, "2.5 h")],
)
def test_durations(value, text):
    assert duration(value) == text
