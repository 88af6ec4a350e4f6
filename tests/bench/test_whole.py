"""Whole loops are timed on the true architectures, made narrow, and their rows are what their steps say."""

import contextlib
import dataclasses
import importlib
import json
import signal
import statistics

import pytest
import samples
import torch
from typer.testing import CliRunner

import negengine
from negengine.bench import architectures, ceilings, whole
from negengine.bench import footprint as footprints
from negengine.bench.architectures import ARCHITECTURES
from negengine.bench.documents import shown
from negengine.bench.footprint import footprint
from negengine.bench.look import precise
from negengine.bench.loops import Loop
from negengine.bench.results import SCHEMA_FILE, read
from negengine.bench.whole import METHODS, PUBLISHED, WITHOUT, Setting, Variant, measure, subject, turns
from negengine.cli import app
from negengine.diffusers.families import find_denoiser

SIZES = {"flux-dev": 64, "sdxl-base": 512}
STEPS = {"flux-dev": 3, "sdxl-base": 5}  # the fewest with one in NegToMe's window and one outside
runner = CliRunner()


def forget():
    footprints._followed.cache_clear()
    footprints._weights.cache_clear()


@pytest.fixture
def narrow(monkeypatch):
    """One attention head of the true size. What was computed of other widths is forgotten."""
    forget()
    monkeypatch.setitem(architectures.FLUX_DEV, "num_attention_heads", 1)
    monkeypatch.setitem(architectures.SDXL_BASE, "block_out_channels", (32, 64, 64))
    monkeypatch.setitem(architectures.SDXL_BASE, "attention_head_dim", [1, 1, 1])
    yield
    forget()


def setting(model="flux-dev", **changes):
    usual = {"depth": (1, 1), "size": SIZES[model], "images": 2, "steps": STEPS[model], "dtype": torch.float32, "rounds": 2}
    return Setting(model, **usual | changes)


def measured(given):
    """Rows by variant, what was left out, and the pipeline."""
    found = subject(given)
    result = measure(given, found)
    assert len({row["variant"] for row in result.rows}) == len(result.rows)
    return {row["variant"]: row for row in result.rows}, result.left_out, found


def hooks(module):
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules())


@pytest.mark.parametrize("model", ["flux-dev", pytest.param("sdxl-base", marks=pytest.mark.exhaustive)])
def test_every_method_runs_or_is_left_out_with_a_reason(model, narrow, tmp_path):
    given = setting(model, methods=METHODS, rounds=1)
    rows, left_out, found = measured(given)
    name = whole.case(given, found)
    assert name == f"{model} 1+1 {given.size} x {given.size}, 2 images, fp32, {STEPS[model]} steps"
    others = {method for method in METHODS if method != "negtome"}
    assert {*rows, *(text.removeprefix(f"{name}: ") for text in left_out)} >= {WITHOUT, PUBLISHED, *others}
    assert all(len(reason) > 20 for reason in left_out.values())
    assert not set(rows) & {text.removeprefix(f"{name}: ") for text in left_out}
    if model == "flux-dev":
        assert {text.removeprefix(f"{name}: ") for text in left_out} == {"guidance-interval"}
    else:
        assert {"dng", "nag"} <= set(rows)
    roles = {variant: row["role"] for variant, row in rows.items()}
    assert roles.pop(WITHOUT) == "without"
    assert roles.pop(PUBLISHED) == "published"
    assert set(roles.values()) == {"ours"}
    assert {row["method"] for row in rows.values() if row["role"] == "ours"} == {"negtome", *(others & set(rows))}
    assert (rows[WITHOUT]["method"], rows[PUBLISHED]["method"]) == (None, "negtome")
    content = samples.document("model", list(rows.values()), left_out=left_out)
    path = samples.written(tmp_path / "model.json", content)
    assert shown("model.json", read(path)).rows == content["rows"]


@pytest.mark.parametrize("model", ["flux-dev", pytest.param("sdxl-base", marks=pytest.mark.exhaustive)])
def test_a_row_is_what_its_steps_say(model, narrow):
    given = setting(model)
    rows, left_out, found = measured(given)
    assert not left_out
    base = rows[WITHOUT]
    timesteps = found.pipe.scheduler.timesteps.tolist()
    low, high = find_denoiser(found.pipe)[1].defaults["negtome"]["timesteps"]
    active = [low <= t <= high for t in timesteps]
    assert any(active)
    assert not all(active)
    ours = next(row for row in rows.values() if row["role"] == "ours")
    assert set(base) == set(json.loads(SCHEMA_FILE.read_text())["$defs"]["model"]["properties"])
    assert base["active"] == [False] * given.steps
    assert 0.4 < ours["merged_share"] < 0.6
    assert base["merged_share"] is rows[PUBLISHED]["merged_share"] is None
    assert (base["overhead"], base["overhead_p10"], base["overhead_p90"]) == (0, 0, 0)
    for row in (ours, rows[PUBLISHED]):
        assert row["active"] == active
        steps, without = row["step_seconds"], base["step_seconds"]
        assert [len(loop) for loop in steps] == [given.steps] * 2
        acting = [loop[place] for loop in steps for place in range(given.steps) if active[place]]
        resting = [loop[place] for loop in steps for place in range(given.steps) if not active[place]]
        assert (row["active_step"], row["inactive_step"]) == (statistics.median(acting), statistics.median(resting))
        ratios = [steps[turn][place] / without[turn][place] for turn in range(2) for place in range(given.steps) if active[place]]
        assert row["overhead_active_step"] == pytest.approx(statistics.median(ratios) - 1)
        loops = [sum(loop) for loop in steps]
        assert row["p10"] <= row["median"] <= row["p90"]
        assert statistics.median(loops) <= row["median"]
        assert row["overhead_p10"] <= row["overhead"] <= row["overhead_p90"]


class Clock:
    """Loops of known length: of each variant and step, in seconds."""

    def __init__(self, monkeypatch, seconds):
        self.calls = 0

        def loop(given, found, one):
            steps = seconds(one.variant, self.calls)
            self.calls += 1
            one.loops.append(Loop(sum(steps) + 0.5, tuple(steps), (1000.0, 800.0, 500.0)))

        monkeypatch.setattr(turns, "_loop", loop)


def test_overhead_and_the_whole_model_by_hand(narrow, monkeypatch):
    def seconds(variant, call):
        step = 1.0 + (call + 1) // 4  # three to warm up, then four a round: the machine becomes slower from round to round
        return [step * (1.5 if variant.methods else 1.0), step, step]

    Clock(monkeypatch, seconds)
    rows, _, _ = measured(setting(rounds=3))
    base, published = rows[WITHOUT], rows[PUBLISHED]
    ours = next(row for row in rows.values() if row["role"] == "ours")
    for row in (ours, published):
        assert row["active"] == [True, False, False]
        wholes = [(3.5 * step + 0.5) / (3 * step + 0.5) for step in base_steps(base)]
        assert row["overhead"] == pytest.approx(statistics.median(wholes) - 1)
        assert row["overhead_active_step"] == pytest.approx(0.5)
        assert row["noise"] == 0
        needs = {depth: footprint(ARCHITECTURES["flux-dev"], depth, 64, 2, torch.float32) for depth in ((1, 1), (19, 38))}
        forward = needs[19, 38].flops / needs[1, 1].flops
        search = needs[19, 38].search_flops / needs[1, 1].search_flops
        step = statistics.median(base_steps(base))
        full = row["full"]
        assert full["without"] == pytest.approx(25 * step * forward)
        assert full["loop"] - full["without"] == pytest.approx(7 * 0.5 * step * search)
        assert full["overhead"] == pytest.approx(full["loop"] / full["without"] - 1)
        assert (full["depth"], full["steps"], full["active"]) == ("full", 25, 7)
    assert base["full"]["loop"] == base["full"]["without"]
    assert base["full"]["overhead"] == 0


def test_the_noise_is_the_spread_of_the_base_against_itself(narrow, monkeypatch):
    def seconds(variant, call):
        again = call >= 3 and (call - 3) % 4 == 1
        return [1.0 + again * (0.2 if call < 8 else -0.2), 1.0, 0.5]  # of 3 s with what is beside the steps

    Clock(monkeypatch, seconds)
    rows, _, _ = measured(setting(rounds=2))
    for row in rows.values():
        assert row["noise"] == pytest.approx(0)
        assert (row["noise_p10"], row["noise_p90"]) == pytest.approx((-0.8 * 0.2 / 3, 0.8 * 0.2 / 3))
    assert f"noise {100 * 0.8 * 0.2 / 3:.1f} %" in whole.table(list(rows.values()))


def base_steps(base):
    return [loop[1] for loop in base["step_seconds"]]


def test_no_round_begins_that_would_end_too_late(narrow, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(turns.time, "monotonic", lambda: now[0])

    def seconds(variant, call):
        now[0] += 1.0
        return [0.2, 0.2, 0.2]

    Clock(monkeypatch, seconds)
    said = []
    given = setting(rounds=5, seconds=11.5)
    result = measure(given, subject(given), said.append)
    assert {row["rounds"] for row in result.rows} == {2}  # 3 loops to warm up, 4 a round: 3 + 2 * 4 <= 11.5 < 3 + 3 * 4
    assert said[-1] == "2 of 5 rounds: the next would end after the time given"


def test_without_time_for_a_round_the_loops_that_warmed_up_count(narrow, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(turns.time, "monotonic", lambda: now[0])

    def seconds(variant, call):
        now[0] += 1.0
        return [0.25 + 0.25 * call, 0.5, 0.25]

    clock = Clock(monkeypatch, seconds)
    said = []
    given = setting(rounds=5, seconds=5)
    result = measure(given, subject(given), said.append)
    assert {row["rounds"] for row in result.rows} == {1}
    assert clock.calls == 4  # one of each variant, and the base again
    assert said[-1].startswith("a round would end after the time given")


def test_a_run_that_is_stopped_keeps_its_whole_rounds(narrow, monkeypatch):
    """Four loops a round after three to warm up: it is stopped in the third round."""

    def seconds(variant, call):
        if call == 3 + 2 * 4 + 1:
            raise KeyboardInterrupt
        return [1.0 + call, 1.0, 1.0]

    clock = Clock(monkeypatch, seconds)
    given = setting(rounds=5)
    result = measure(given, subject(given))
    assert result.interrupted
    assert {row["rounds"] for row in result.rows} == {2}
    assert [len(row["step_seconds"]) for row in result.rows] == [2, 2, 2]
    assert result.rows[0]["step_seconds"] == [[4.0, 1.0, 1.0], [8.0, 1.0, 1.0]]
    clock.calls = 8  # it is stopped in the first round
    with pytest.raises(KeyboardInterrupt):
        measure(given, subject(given))


def test_methods_are_taken_off_where_a_loop_ends_early(narrow):
    given = setting(rounds=1, steps=2)
    found = subject(given)
    before, calls = hooks(found.pipe.transformer), []

    def call(**further):
        calls.append(hooks(found.pipe.transformer))
        raise KeyboardInterrupt

    variant = Variant("x", "ours", (negengine.NegToMe(threshold=0.5, group_size=2),))
    with pytest.raises(KeyboardInterrupt):
        turns._loop(given, dataclasses.replace(found, call=call), turns.Timed(variant))
    assert calls[0] > before == hooks(found.pipe.transformer)


def test_the_pipeline_is_as_it_was(narrow):
    given = setting(methods=("negtome", "nag"), rounds=1, steps=2)
    found = subject(given)
    denoiser = found.pipe.transformer
    first = found.call(output_type="latent").images
    before = hooks(denoiser), dict(vars(type(found.pipe))), set(vars(found.pipe))
    measure(given, found)
    assert (hooks(denoiser), dict(vars(type(found.pipe))), set(vars(found.pipe))) == before
    assert torch.equal(found.call(output_type="latent").images, first)
    with pytest.raises(ValueError, match="no method is applied to this FluxPipeline"):
        negengine.status(found.pipe)


def test_a_method_that_refuses_is_left_out_and_the_base_is_not(narrow, monkeypatch):
    given = setting(rounds=1)

    def loop(given, found, one):
        if one.variant.name == refusing:
            raise ValueError("this one\ncannot")
        one.loops.append(Loop(3.0, (1.0, 1.0, 1.0), (1000.0, 800.0, 500.0)))

    monkeypatch.setattr(turns, "_loop", loop)
    refusing = PUBLISHED
    rows, left_out, found = measured(given)
    assert left_out == {f"{whole.case(given, found)}: {PUBLISHED}": "this one cannot"}
    assert PUBLISHED not in rows
    refusing = WITHOUT
    with pytest.raises(ValueError, match="this one"):
        measured(given)


def test_an_attention_backend_that_is_not_there_is_left_out_for_every_variant(narrow):
    given = setting(attention=("native", "flash"), rounds=1, steps=2)
    rows, left_out, found = measured(given)
    name = whole.case(given, found)
    assert {row["attention"] for row in rows.values()} == {"native"}
    assert set(left_out) == {f"{name}: {variant}, flash" for variant in rows}
    assert len(set(left_out.values())) == 1


@pytest.fixture
def traced(monkeypatch):
    """Compiled by blocks, but the graphs are run as they were traced."""
    from diffusers import FluxTransformer2DModel

    usual = FluxTransformer2DModel.compile_repeated_blocks
    monkeypatch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", lambda self, **how: usual(self, backend="eager", **how))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_graphs_are_counted_and_none_is_made_after_warm_up(narrow, traced):
    rows, left_out, _ = measured(setting(compiled=("blocks",)))
    assert not left_out
    seen = {name: row["graphs"] for name, row in rows.items()}
    assert {name for name, graphs in seen.items() if graphs is None} == {name for name in seen if not name.endswith(", blocks")}
    assert seen[f"{WITHOUT}, blocks"]["graphs"] == 2  # FLUX.1 has two kinds of blocks
    assert 0 < seen[f"{PUBLISHED}, blocks"]["graphs"] <= 4
    assert {graphs["recompiles"] for graphs in seen.values() if graphs} == {0}


def test_graphs_made_after_warm_up_are_recompiles(narrow, monkeypatch):
    calls = []

    def loop(pipe, device, call):
        calls.append(call)
        torch._dynamo.utils.counters["stats"]["unique_graphs"] += len(calls)
        return Loop(3.0, (1.0, 1.0, 1.0), (1000.0, 800.0, 500.0))

    monkeypatch.setattr(turns, "timed_loop", loop)
    monkeypatch.setattr(whole.measuring, "prepared", lambda *_: contextlib.nullcontext())
    rows, _, _ = measured(setting(compiled=("blocks",), eager=False, rounds=1))
    base, ours, published = (row["graphs"] for row in rows.values())
    assert (base["graphs"], ours["graphs"], published["graphs"]) == (1 + 2, 3 + 4, 5 + 6)
    assert (base["recompiles"], ours["recompiles"], published["recompiles"]) == (7 + 8, 9, 10)


@pytest.mark.exhaustive  # compiles
@pytest.mark.parametrize("model", SIZES)
def test_compiled_rows_have_a_base_of_their_own(model, narrow):
    rows, left_out, found = measured(setting(model, compiled=("blocks",), eager=False, rounds=1))
    assert not left_out
    assert {row["compiled"] for row in rows.values()} == {"blocks"}
    assert {f"{WITHOUT}, blocks", f"{PUBLISHED}, blocks"} < set(rows)
    denoiser, _ = find_denoiser(found.pipe)
    assert all(module._compiled_call_impl is None for module in denoiser.modules())


def test_what_would_act_in_no_step_is_left_out(narrow, monkeypatch):
    monkeypatch.setattr(turns, "_loop", lambda given, found, one: one.loops.append(Loop(2.0, (1.0, 1.0), (899.0, 500.0))))
    rows, left_out, _ = measured(setting(steps=2))
    assert set(rows) == {WITHOUT}
    assert len(left_out) == 2
    (reason,) = set(left_out.values())
    assert reason == "acts in no step: its window is from 900 to 1000, the run's timesteps are 899, 500; take more --steps"


def test_windows():
    variant = Variant("x", "ours", (negengine.NegToMe(),), (800.0, 1000.0))
    assert [variant.acts(t) for t in (1000.0, 800.0, 799.9)] == [True, True, False]
    assert dataclasses.replace(variant, window=None).acts(0.0)
    assert not Variant(WITHOUT, "without").acts(900.0)


def test_readings_that_the_driver_refuses_are_unknown():
    before = {"energy_mj": 1000}
    after = {"sm_mhz": 1700, "power_mw": 350_000, "celsius": 60, "throttle_reasons": 4, "energy_mj": 9000}
    found = turns._gpu(before, after, 4)
    assert found == {
        "clock_mhz": 1700, "power_w": 350.0, "temperature_c": 60, "throttling": ["power cap"], "energy_j_per_image": 2.0
    }  # fmt: skip
    refused = turns._gpu({"energy_mj": "no"}, dict.fromkeys(after, "Not Supported"), 4)
    assert refused == dict.fromkeys(found) | {"throttling": ["Not Supported"]}
    assert turns._gpu(None, None, 4) is None
    assert turns._gpu({"refused": "no"}, {"refused": "no"}, 4) is None


def test_why_there_are_no_instruments(monkeypatch):
    monkeypatch.setattr(ceilings, "nvml", lambda: None)
    assert whole.no_instruments() == "pip install nvidia-ml-py"
    monkeypatch.setattr(ceilings, "nvml", lambda: {"refused": "Driver Not Loaded"})
    assert whole.no_instruments() == "Driver Not Loaded"
    monkeypatch.setattr(ceilings, "nvml", lambda: {"sm_mhz": 1})
    assert whole.no_instruments() is None


# --- the command -------------------------------------------------------------------------------------------------


def run(*arguments):
    return runner.invoke(app, ["bench", "model", *map(str, arguments)])


NARROW = ("--model", "flux-dev", "--depth", "1+1", "--size", 64, "--images", 2, "--dtype", "float32", "--rounds", 1)


def test_a_second_run_replaces_the_rows_of_its_case_and_keeps_the_others(narrow, tmp_path):
    command = (*NARROW, "--output", tmp_path)
    assert run(*command, "--steps", 3).exit_code == 0
    first = read(tmp_path / "model.json")["rows"]
    result = run(*command, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert run(*command, "--steps", 3).exit_code == 0
    rows = read(tmp_path / "model.json")["rows"]
    assert [(row["case"], row["variant"]) for row in rows[3:]] == [(row["case"], row["variant"]) for row in first]
    assert {row["steps"] for row in rows[:3]} == {2}
    assert [row["median"] for row in rows[3:]] != [row["median"] for row in first]
    assert [line for line in result.output.splitlines() if line.startswith(str(tmp_path))] == [
        str(tmp_path / name) for name in ("model.json", "report.html", "report.md")
    ]
    assert "All cases" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2 steps" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_all_pairs_of_images_and_sizes_stand_in_one_folder(narrow, tmp_path, monkeypatch):
    made, kept = [], whole.measuring.made
    monkeypatch.setattr(whole.measuring, "made", lambda setting: made.append(setting) or kept(setting))
    few = ("--model", "flux-dev", "--depth", "1+1", "--dtype", "float32", "--rounds", 1, "--steps", 2, "--device", "cpu")
    pairs = ("--images", 2, "--images", 3, "--images", 2, "--size", 64, "--size", 128)
    result = run(*few, *pairs, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    rows = read(tmp_path / "model.json")["rows"]
    assert list(dict.fromkeys((row["size"], row["images"]) for row in rows)) == [(64, 2), (64, 3), (128, 2), (128, 3)]
    assert len(made) == 1
    assert "time added, over images" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert run(*few, *pairs, "--rehearse", "--output", tmp_path).output.count("flux-dev 1+1, ") == 4


def given_groups(*found):
    yield from found


def stopped_by(how):
    """Groups of a run, the second of which is stopped."""

    def groups(*_):
        yield whole.Measured([samples.loop("without", "without"), samples.loop("cpu auto", share=0.2)], {})
        how()
        pytest.fail("went on")

    return groups


def fails():
    raise RuntimeError("no memory left")


@pytest.mark.parametrize(
    "how, code, said",
    [
        (lambda: signal.raise_signal(signal.SIGINT), 130, "stopped: what was measured until then is kept"),
        (lambda: signal.raise_signal(signal.SIGTERM), 130, "stopped: what was measured until then is kept"),
        (fails, 2, "error: no memory left"),
    ],
)
def test_what_was_measured_before_the_end_is_kept(tmp_path, monkeypatch, how, code, said):
    monkeypatch.setattr(whole, "check", lambda settings: None)
    monkeypatch.setattr(whole, "cases", stopped_by(how))
    usual = signal.getsignal(signal.SIGTERM)
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs behind it ignore Ctrl-C
    try:
        result = run(*NARROW, "--output", tmp_path)
    finally:
        signal.signal(signal.SIGINT, heeded)
    assert result.exit_code == code
    assert said in result.output.splitlines()
    assert len(read(tmp_path / "model.json")["rows"]) == 2
    assert "cpu auto" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert signal.getsignal(signal.SIGTERM) is usual


def test_a_round_that_was_cut_is_kept_and_nothing_follows(tmp_path, monkeypatch):
    def groups(*_):
        yield whole.Measured([samples.loop("without", "without")], {}, interrupted=True)
        pytest.fail("went on")

    monkeypatch.setattr(whole, "check", lambda settings: None)
    monkeypatch.setattr(whole, "cases", groups)
    result = run(*NARROW, "--output", tmp_path)
    assert result.exit_code == 130
    assert result.output.count("stopped") == 1
    assert len(read(tmp_path / "model.json")["rows"]) == 1


@pytest.mark.parametrize("there", [False, True])
def test_where_nothing_is_measured_nothing_is_written(there, tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "cases", lambda *_: given_groups(whole.Measured([], {"x, flash": "not installed"})))
    monkeypatch.setattr(whole, "check", lambda settings: None)
    folder = tmp_path / "a" / "b"
    if there:
        folder.mkdir(parents=True)
    result = run(*NARROW, "--output", folder)
    assert result.exit_code == 2
    assert "left out:\nx, flash\n    not installed\n" in result.output
    assert "nothing could be measured, for the reasons above" in result.stderr
    assert list(tmp_path.rglob("*")) == ([folder.parent, folder] if there else [])


def test_the_printed_table(narrow):
    rows = [
        samples.loop("without", "without"),
        samples.loop("cpu auto", share=0.2, merged_share=0.51, full=samples.full(0.2)),
        samples.loop("published", "published", share=0.4, merged_share=None),
    ]
    lines = whole.table([*rows, *(row | {"case": "another", "full": None} for row in rows)]).splitlines()
    assert lines[0] == samples.CASE
    assert lines[1].split("  ")[-1].strip() == "added to it"
    figures = f"{precise(rows[1]['median'])} +10.0 % +20.0 % 51.0 % 13.78 s +5.6 %"
    assert " ".join(lines[3].split()) == f"cpu auto {figures}"
    assert lines[1].index("merged") + len("merged") == lines[3].index("51.0 %") + len("51.0 %")
    assert lines == [line.rstrip() for line in lines]
    assert lines[5] == "  noise 0.3 %: so much the loop without a method differs, timed again"
    assert "whole model" not in "".join(lines[7:])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--model", "flux-2"), "nor flux-dev or sdxl-base"),
        (("--model", "/"), "--model / is no pipeline: it has no model_index.json"),
        (("--attention", "best"), "--attention must be of _flash_3, "),
        (("--model", "mnist-flux", "--depth", "1+1"), "--depth is for flux-dev and sdxl-base, whose weights are random"),
        (("--model", "mnist-flux", "--size", "64"), "--size is for flux-dev and sdxl-base and for checkpoints"),
        (("--size", "100"), "the size for flux-dev must be a positive multiple of 16 pixels, got 100"),
        (("--model", "sdxl-base", "--size", "48"), "the size for sdxl-base must be a positive multiple of 32 pixels, got 48"),
        (("--images", "1"), "NegToMe would merge nothing in flux-dev with --images 1 of 1024 x 1024: it takes at least 2"),
        (("--model", "sdxl-base", "--size", "256"), "and pictures large enough for the grids of tokens that it merges; raise"),
        (("--depth", "20+1"), "the depth of flux-dev is two numbers from 1+1 to 19+38, or 'full'; got '20+1'"),
        (("--depth", "2"), "or 'full'; got '2'"),
        (("--dtype", "bf16"), "--dtype must be one of float32, float16, bfloat16, got 'bf16'"),
        (("--method", "tome"), "--method must be of negtome, "),
        (("--compiled", "half"), "compiled must be of blocks, whole, reduce-overhead, got 'half'"),
        (("--no-eager",), "nothing would be measured: neither eager nor compiled"),
        (("--device", "abacus"), "--device abacus cannot be used"),
    ],
)
def test_bad_input_is_one_line(narrow, tmp_path, arguments, message):
    result = run(*arguments, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_said_before_anything_is_allocated(narrow, tmp_path, monkeypatch):
    needed = footprint(ARCHITECTURES["flux-dev"], (19, 38), 128, 2, torch.bfloat16).published
    monkeypatch.setattr(footprints, "free_bytes", lambda device: needed // 2)
    monkeypatch.setattr(whole.measuring, "made", lambda *_: pytest.fail("something was made"))
    result = run("--images", 2, "--size", 128, "--output", tmp_path)
    assert result.exit_code == 2
    needs = f"needs {needed / 1e9:.1f} GB, and {needed / 2e9:.1f} GB are free on "
    assert f"flux-dev of depth 19+38 with 2 images of 128 x 128 {needs}" in result.stderr
    assert "what fits: --depth " in result.stderr


def test_missing_instruments_are_said(narrow, tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "no_instruments", lambda: "pip install nvidia-ml-py")
    monkeypatch.setattr(importlib.import_module("negengine.cli.bench.model"), "check_device", lambda name: None)
    monkeypatch.setattr(whole, "cases", lambda *_: given_groups(whole.Measured([samples.loop("without", "without")], {"x": "why"})))
    monkeypatch.setattr(whole, "check", lambda settings: None)
    result = run("--device", "cuda", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("clocks, power and energy are left out: pip install nvidia-ml-py\n")
    assert "left out:\nx\n    why\n" in result.output


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "model.json, to which results would be added, is not JSON"),
        (samples.document("model", [], schema=7), "model.json has schema 7, and results of schema 1 cannot be added"),
        (samples.operator(), "model.json has what 'operator', and results of what 'model' cannot be added"),
        (samples.models(), "the folder holds results of another machine or of other versions: processor A processor and "),
    ],
)
def test_what_results_cannot_stand_beside_is_said_before_they_are_measured(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(whole, "cases", lambda *_: pytest.fail("measured"))
    path = samples.written(tmp_path / "model.json", content)
    before = path.read_text()
    result = run(*NARROW, "--output", tmp_path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert path.read_text() == before
