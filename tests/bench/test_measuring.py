"""The measuring code: turns, percentiles, floors, memory, what is left out, the file, the pictures."""

import json
import subprocess
from dataclasses import asdict, fields, replace

import pytest
import torch
from negengine.kernels.cpu import library

from negengine.bench import SHAPES, interleave, suite
from negengine.bench import ceilings as ceilings_
from negengine.bench.ceilings import Ceilings, floor
from negengine.bench.memory import CLEAR, growth
from negengine.bench.results import Results, table
from negengine.bench.shapes import SCALING, Shape
from negengine.bench.suite import AGAIN, Case, Row
from negengine.bench.variants import precision, usable

RATES = Ceilings({"fp32": 100.0, "bf16": 200.0, "int8": 400.0}, 1e10)


@pytest.fixture
def rates(monkeypatch):
    """The machine does what it is told, and loses a fifth during a measurement."""
    readings = iter([RATES, Ceilings({name: 0.8 * rate for name, rate in RATES.gops.items()}, 1e10)] * 20)
    monkeypatch.setattr(ceilings_, "reading", lambda device: (found := next(readings), {"gops": found.gops}))


@pytest.fixture
def measured(small, rates):
    return suite.measure(Case(small, torch.float32, choice={"compiled": False}), "cpu", rounds=3, warmup=1, memory=False)


def test_variants_take_turns_and_prepare_outside_of_the_time():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = interleave(variants, rounds=3, warmup=1, prepare={"b": lambda: calls.append("prepare b")})
    assert calls == ["a", "prepare b", "b"] * 4
    assert all(len(timing.seconds) == 3 for timing in timings.values())


def test_preparing_is_not_timed():
    import time

    timings = interleave({"a": lambda: None}, rounds=3, warmup=0, prepare={"a": lambda: time.sleep(0.02)})
    assert max(timings["a"].seconds) < 0.015


def test_percentiles(ten):
    assert ten.median == 5.5
    assert ten.percentile(10) == pytest.approx(1.9)
    assert ten.summary() == {"median": 5.5, "p10": pytest.approx(1.9), "p90": pytest.approx(9.1), "rounds": 10}


@pytest.mark.parametrize("gate, low, high", [("half", 0.3, 0.7), ("all", 1, 1), ("none", 0, 0)])
def test_inputs_open_the_gate_as_they_say(gate, low, high):
    share = suite.merged_share(Shape("", 3, 128, 256).inputs(torch.float32, "cpu", gate=gate), "paper")
    assert low <= share <= high


def test_the_floor_is_search_and_merge():
    shape, dtype = SHAPES["flux-1024"], torch.bfloat16
    assert shape.merge_bytes(dtype, 1.0) == pytest.approx(176e6, rel=0.01)
    assert shape.merge_bytes(dtype, 0.0) == 0
    found = floor(shape, dtype, "bf16", 1.0, Ceilings({"bf16": 790e3}, 4.3e12))
    assert found.search == pytest.approx(0.39e-3, rel=0.01)
    assert found.merge == pytest.approx(0.041e-3, rel=0.01)
    assert found.total == found.search + found.merge
    assert floor(shape, dtype, "fp8", 1.0, RATES) is None


def test_rows_of_a_case(measured, small):
    rows = {row.variant: row for row in measured.rows}
    ours, rival, bare = measured.rows[0], rows["release"], rows["gemm"]
    assert ours.role == "ours"
    assert rival.ratio == {}
    assert ours.ratio["release"] == pytest.approx(rival.median / ours.median)
    assert ours.ratio_p10["gemm"] == pytest.approx(bare.p10 / ours.p10)
    assert ours.p10 <= ours.median <= ours.p90
    assert ours.rounds == 3
    assert rival.gops == pytest.approx(small.search_flop / rival.median / 1e9)
    assert rival.peak_reached == pytest.approx(rival.gops / 100)
    assert rival.floor_reached == pytest.approx((rival.floor_search + rival.floor_merge) / rival.median)
    assert bare.floor_merge == 0 < rival.floor_merge
    assert rows["torch auto"].precision == "fp32"
    assert 0.3 < ours.merged_share < 0.7


def test_a_peak_that_moves_is_warned_of(measured):
    assert measured.rows[0].peak_drift == pytest.approx(0.2)
    assert "20%" in measured.rows[0].warning
    assert measured.check["after"]["gops"]["fp32"] == pytest.approx(80)
    assert "WARNING" in table([asdict(row) for row in measured.rows])


def test_noise_is_the_first_variant_timed_twice(small, rates, monkeypatch):
    seen = []

    def clock(calls, rounds, warmup, prepare):
        seen.extend(calls)
        return {name: suite.Timing((1.5 if name.endswith(AGAIN) else 1.0,) * rounds) for name in calls}

    monkeypatch.setattr(suite, "interleave", clock)
    found = suite.measure(Case(small, torch.float32, choice={"compiled": False}), "cpu", rounds=2, memory=False)
    assert found.rows[0].noise == pytest.approx(0.5)
    assert seen[-1] == found.rows[0].variant + AGAIN
    assert AGAIN not in "".join(row.variant for row in found.rows)


def test_several_input_sets_are_counted_as_calls(small):
    x = small.inputs(torch.float32, "cpu")
    found = suite.variants([x, x], "paper", compiled=False)[0]
    slow = replace(found[0], run=lambda: __import__("time").sleep(0.02), prepare=None)
    seconds = suite.time_variants([slow], 2, "cpu", 3, 0)[slow.name].median
    assert 0.009 < seconds < 0.02


def test_default_cases_are_part_of_all(monkeypatch):
    everything = {case.name for case in suite.cases("cpu", True)}
    usual = {case.name for case in suite.cases("cpu", False)}
    assert usual < everything
    assert set(suite.left_out("cpu", False)) == everything - usual
    assert suite.left_out("cpu", True) == []
    for name in SHAPES:
        for dtype in ("bf16", "fp32"):
            assert {f"{name} {dtype} paper half", f"{name} {dtype} release half"} <= everything
    assert {"sdxl-32 bf16 paper all", "sdxl-32 fp32 paper none"} <= usual
    on_gpu = {case.name for case in suite.cases("cuda", False)}
    assert everything < on_gpu
    assert "flux-1024 fp16 release half" in on_gpu


@pytest.mark.skipif(not CLEAR.exists(), reason="this system does not tell the peak of the resident set")
def test_memory_grows_by_the_matrix_of_a_rival():
    shape = Shape("", 2, 2048, 16)
    found = growth(shape, torch.float32, "cpu", "paper", compiled=False)
    matrix = 2048 * 2048 * 4
    assert matrix <= found["gemm"]["extra_bytes"] < 1.6 * matrix
    assert 2 * matrix <= found["release"]["extra_bytes"] < 4 * matrix
    for name, grown in found.items():
        if name.startswith("cpu"):
            assert grown["extra_bytes"] < matrix / 4
            assert 0 < grown["workspace_bytes"] < matrix / 4


def test_a_failed_memory_process_is_an_error(small, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no memory left")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="no memory left"):
        growth(small, torch.float32, "cpu", "paper")


def test_scaling_drops_what_is_too_slow_or_too_large_and_says_so(rates, monkeypatch):
    sizes = [Shape(f"T={t}", 2, t, 32) for t in (32, 64, 128)]
    series = list(suite.scaling("cpu", torch.float32, "T", rounds=1, sizes=sizes, rival_limit=0.0))
    assert {"release", "lean", "gemm"} <= {row.variant for row in series[0].rows}
    assert {row.role for row in series[1].rows} == {row.role for row in series[2].rows} == {"ours"}
    assert series[2].left_out["T release"] == "from T=64 on a call would take more than 0 s"
    monkeypatch.setattr(suite, "memory_bytes", lambda device: 4 * 2 * 64 * 64 * 4)
    series = list(suite.scaling("cpu", torch.float32, "T", rounds=1, sizes=sizes, rival_limit=100.0))
    assert "release" in {row.variant for row in series[1].rows}
    assert "release" not in {row.variant for row in series[2].rows}
    assert "memory" in series[2].left_out["T release"]


def test_scaling_reaches_what_was_asked():
    assert max(shape.tokens for shape in SCALING["T"]) == 16384
    assert max(shape.images for shape in SCALING["N"]) == 16
    assert [shape.channels for shape in SCALING["D"]][:: len(SCALING["D"]) - 1] == [64, 4096]


def test_the_file(measured, tmp_path):
    results = Results(tmp_path / "cpu" / "operator.json", "operator")
    results.add(measured.rows, measured.check, {"flash-kmeans": "not installed"})
    document = json.loads(results.path.read_text())
    assert list(document) == ["schema", "what", "date", "isa", "machine", "versions", "left_out", "checks", "rows"]
    assert document["schema"] == 1
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert document["versions"]["torch"] == torch.__version__
    assert [row["variant"] for row in document["rows"]] == [row.variant for row in measured.rows]
    assert set(document["rows"][0]) == {field.name for field in fields(Row)}
    assert document["checks"][0]["case"] == measured.rows[0].case
    results.add([{"variant": "x"}])
    assert len(json.loads(results.path.read_text())["rows"]) == len(measured.rows) + 1
    assert sorted(path.name for path in results.path.parent.iterdir()) == ["operator.json"]


@pytest.mark.skipif(library.missing() is not None, reason="no native library")
def test_peaks_are_those_of_the_instruction_set_in_use():
    before = library.isa()
    try:
        library.set_isa("portable")
        assert set(ceilings_.cpu_peaks()) <= {"fp32"}
        assert usable("cpu", torch.bfloat16, ["cpu"]) == [("cpu", "auto")]
        assert precision("cpu", torch.bfloat16, "auto") == "fp32"
    finally:
        library.set_isa(before)
    if before == "avx512_bf16":
        assert set(ceilings_.cpu_peaks()) == {"fp32", "bf16", "int8"}
        assert precision("cpu", torch.bfloat16, "auto") == "int8"
        assert usable("cpu", torch.bfloat16, ["cpu"]) == [("cpu", "auto"), ("cpu", "exact")]
        assert usable("cpu", torch.float32, ["cpu"]) == [("cpu", "auto"), ("cpu", "bf16"), ("cpu", "int8")]
        assert precision("cpu", torch.float32, "int8") == "int8"
    assert precision("triton", torch.float16, "auto") == "fp16"
    assert precision("torch", torch.bfloat16, "auto") == "fp32"


def test_a_floor_takes_the_higher_of_two_readings():
    other = Ceilings({"fp32": 90.0, "bf16": 250.0, "int8": 400.0}, 2e10)
    assert ceilings_.best(RATES, other) == Ceilings({"fp32": 100.0, "bf16": 250.0, "int8": 400.0}, 2e10)


def test_drift_is_that_of_the_peak_that_moved_most():
    after = Ceilings({"fp32": 101.0, "bf16": 150.0, "int8": 400.0}, 1e10)
    assert ceilings_.drift(RATES, after) == pytest.approx(0.25)
    assert ceilings_.drift(Ceilings({}, 1.0), Ceilings({}, 1.0)) == 0
