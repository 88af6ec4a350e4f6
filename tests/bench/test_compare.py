"""Result files: their schema, and which changes between two of them count."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from samples import CASE, VERSIONS, document, model_row, operator_row, timing, written

from negengine.bench import compare as comparing
from negengine.bench.compare import FASTER, SAME, SLOWER, WITHIN, OtherMachine, Spread, compare, verdict
from negengine.bench.results import SCHEMA, SCHEMA_FILE, Results, read
from negengine.bench.suite import Row

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
BY_HAND = ("predicted.json", "seen.json", "h200/host.json")  # no study wrote these: their keys are their own
COMMITTED = sorted(
    path for path in RESULTS.rglob("*.json") if not str(path).endswith(BY_HAND) and '"schema"' in path.read_text()[:100]
)
SCHEMA_TEXT = json.loads(SCHEMA_FILE.read_text())


def test_the_schema_is_one_and_describes_every_key_of_a_row():
    Draft202012Validator.check_schema(SCHEMA_TEXT)
    assert SCHEMA_TEXT["properties"]["schema"] == {"const": SCHEMA}
    operator, model = SCHEMA_TEXT["$defs"]["operator"], SCHEMA_TEXT["$defs"]["model"]
    assert operator["required"] == list(operator["properties"]) == [field.name for field in dataclasses.fields(Row)]
    required = [name for name in model["properties"] if name not in ("noise_p10", "noise_p90")]  # which older files lack
    assert model["required"] == required == list(model_row())


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(RESULTS)))
def test_committed_results_have_the_schema(path):
    assert read(path)["rows"]


def test_both_described_studies_can_be_read(tmp_path):
    assert {"operator", "operator-avx2"} <= {path.stem for path in COMMITTED}
    for what, rows in (("operator", [operator_row()]), ("model", [model_row(), model_row("cpu auto")])):
        assert read(written(tmp_path / "a.json", document(what, rows)))["rows"] == rows


def test_what_is_written_can_be_read(tmp_path):
    file = Results(tmp_path / "operator.json", "operator")
    file.add([operator_row()], {"case": "a"}, {"flash-kmeans": "not installed"})
    assert read(file.path) == file.document


def test_a_key_may_be_added(tmp_path):
    assert read(written(tmp_path / "a.json", document("operator", [operator_row(new=1)], newer={})))["newer"] == {}


ROW = " (sdxl-32 bf16 paper half, cpu exact): "


def changed(**changes):
    return document("operator", [operator_row(), operator_row("cpu exact") | changes])


def without_key(found, *keys):
    *way, last = keys
    at = found
    for key in way:
        at = at[key]
    del at[last]
    return found


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "a.json is not JSON: "),
        ("", "a.json is not JSON: "),
        ("[]", "no result file: it has no key 'schema'"),
        ('{"what": "dng"}', "no result file: it has no key 'schema'"),
        (document("operator", [], schema=2), "has schema 2; this version of negengine reads schema 1"),
        (document("operator", [], schema=True), "a.json: schema: 1 was expected"),
        (json.dumps(changed(median=float("nan"))), "not JSON: NaN is no number"),
        (without_key(changed(), "machine"), "a.json: 'machine' is a required property"),
        (without_key(changed(), "what"), "a.json: 'what' is a required property"),
        (without_key(changed(), "machine", "threads"), "a.json: machine: 'threads' is a required property"),
        (document("operator", [operator_row()], date="yesterday"), "a.json: date: 'yesterday' does not match"),
        (
            document("operator", [operator_row()], versions=VERSIONS | {"torch": 2.13}),
            "a.json: versions.torch: 2.13 is not of type",
        ),
        (document("operator", [operator_row(), 3]), "a.json: rows[1]: 3 is not of type 'object'"),
        (document("dispatch", [{"median": -1}]), "a.json: rows[0].median: -1 is less than"),
        (without_key(changed(), "rows", 1, "ratio_p10"), f"a.json: rows[1]{ROW}'ratio_p10' is a required property"),
        (changed(median="fast"), f"a.json: rows[1].median{ROW}'fast' is not of type 'number'"),
        (changed(median=0), f"a.json: rows[1].median{ROW}0 is less than or equal to the minimum of 0"),
        (changed(role="mine"), f"a.json: rows[1].role{ROW}'mine' is not one of ['ours', 'rival', 'search']"),
        (changed(ratio={"lean": None}), f"a.json: rows[1].ratio.lean{ROW}None is not of type 'number'"),
        (
            document("model", [operator_row()]),
            "a.json: rows[0] (sdxl-32 bf16 paper half, cpu auto): 'model' is a required property",
        ),
        (
            document("model", [model_row(full={"depth": "full"})]),
            f"a.json: rows[0].full ({CASE}, without): 'steps' is a required property",
        ),
        (
            document("model", [model_row(step_seconds=[[1.0], [0]])]),
            f"a.json: rows[0].step_seconds[1][0] ({CASE}, without): 0 is less than",
        ),
        (
            document("model", [model_row(compiled="half")]),
            f"a.json: rows[0].compiled ({CASE}, without): 'half' is not one of [None, 'blocks'",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_broken_file_is_one_clear_error(tmp_path, content, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read(written(tmp_path / "a.json", content))
    assert len(str(raised.value).removeprefix(str(tmp_path))) < 300


def test_an_error_that_quotes_a_row_is_short(tmp_path):
    rows = [operator_row() for _ in range(50)]
    with pytest.raises(ValueError, match=r"a\.json: rows: .{30,} … .{30,}is not of type 'array'") as raised:
        read(written(tmp_path / "a.json", document("operator", {"all": rows})))
    assert len(str(raised.value).removeprefix(str(tmp_path))) < 200


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing.json")


def test_reading_says_what_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ImportError, match=r"pip install 'negengine\[bench\]'"):
        read(written(tmp_path / "a.json", document("operator", [])))


seconds = st.floats(1e-6, 1e3)
spreads = st.tuples(seconds, seconds, seconds).map(sorted).map(lambda three: Spread(three[1], three[0], three[2]))
thresholds = st.floats(0, 2)


@given(spreads, spreads, thresholds)
def test_a_row_is_slower_only_beyond_the_threshold_and_the_spread(old, new, threshold):
    found = verdict(old, new, threshold)
    apart = new.p10 > old.p90 or new.p90 < old.p10
    moved = abs(new.median / old.median - 1) > threshold
    assert (found in (SLOWER, FASTER)) == (apart and moved)
    assert (found == SLOWER) == (apart and moved and new.median > old.median)
    assert (found == SAME) == (not moved)


@given(spreads, spreads, thresholds, st.floats(0, 2))
def test_a_larger_threshold_finds_no_more(old, new, one, other):
    low, high = sorted((one, other))
    if verdict(old, new, high) in (SLOWER, FASTER):
        assert verdict(old, new, low) == verdict(old, new, high)


@given(spreads, thresholds)
def test_a_row_is_the_same_as_itself(spread, threshold):
    assert verdict(spread, spread, threshold) == SAME


@given(spreads, spreads)
def test_files_the_other_way_round_turn_the_verdict_round(old, new):
    turned = {SLOWER: FASTER, FASTER: SLOWER}
    assert verdict(new, old, 0) == turned.get(verdict(old, new, 0), verdict(old, new, 0))


@pytest.mark.parametrize(
    "median, spread, expected",
    [(1.04, 0.001, SAME), (1.2, 0.05, SLOWER), (0.8, 0.05, FASTER), (1.2, 0.15, WITHIN), (0.8, 0.2, WITHIN)],
)
def test_verdicts(median, spread, expected):
    assert verdict(Spread(1, 0.95, 1.05), Spread(**timing(median, spread)), 0.05) == expected


@pytest.mark.parametrize("three", [(1, 1.1, 1.2), (1, 0.9, 0.95), (0, 0, 0), (float("inf"),) * 3, (float("nan"),) * 3])
def test_a_spread_is_positive_and_in_order(three):
    with pytest.raises(ValueError, match="positive and in order"):
        Spread(*three)


def test_rows_are_joined_and_the_others_named():
    old = document("operator", [operator_row(), operator_row("lean", 0.02), operator_row(case="gone")])
    new = document("operator", [operator_row("gemm", 0.005), operator_row("lean", 0.03), operator_row(median=0.0101)])
    found = compare(old, new)
    assert [(change.variant, change.verdict) for change in found.changes] == [("cpu auto", SAME), ("lean", SLOWER)]
    assert found.changes[1].relative == pytest.approx(0.5)
    assert found.only_old == [("gone", "cpu auto")]
    assert found.only_new == [("sdxl-32 bf16 paper half", "gemm")]
    assert (found.count(SLOWER), found.count(FASTER), found.without_base, found.differences) == (1, 0, [], [])


def test_ratios_of_the_operator_forgive_a_slower_machine():
    def rows(machine, ours):
        return [operator_row(median=machine * ours), operator_row("lean", machine), operator_row("release", 2 * machine)]

    old, slow = document("operator", rows(1.0, 0.5)), document("operator", rows(1.5, 0.5))
    assert [change.verdict for change in compare(old, slow).changes] == [SLOWER] * 3
    found = compare(old, slow, ratios=True)
    assert [(change.variant, change.verdict) for change in found.changes] == [("cpu auto", SAME), ("lean", SAME)]
    assert dataclasses.astuple(found.changes[0].old) == pytest.approx((0.25, 0.25 * 0.98 / 1.02, 0.25 * 1.02 / 0.98))
    assert found.only_old == found.only_new == found.without_base == []
    worse = document("operator", rows(0.5, 0.6))
    assert [change.verdict for change in compare(old, worse).changes] == [FASTER] * 3
    assert compare(old, worse, ratios=True).changes[0].verdict == SLOWER


def test_ratios_of_a_model_are_taken_round_by_round():
    """The machine halves its speed after the first round: seconds spread, ratios do not."""
    drift = (10.0, 20.0, 20.0)

    def rows(over):
        compiled = {"compiled": "blocks"}
        return [
            model_row("without", drift), model_row("cpu auto", tuple(loop * over for loop in drift)),
            model_row("without, blocks", (5.0,) * 3, **compiled), model_row("cpu auto, blocks", (5.5,) * 3, **compiled),
        ]  # fmt: skip

    old, new = document("model", rows(1.02)), document("model", rows(1.2))
    assert {change.variant: change.verdict for change in compare(old, new).changes}["cpu auto"] == WITHIN
    ours, blocks = compare(old, new, ratios=True).changes
    assert (ours.verdict, blocks.verdict) == (SLOWER, SAME)
    assert dataclasses.astuple(ours.old) == pytest.approx((1.02,) * 3)
    assert dataclasses.astuple(blocks.new) == pytest.approx((1.1,) * 3)


def test_rows_without_a_base_have_no_ratio_and_are_named():
    flash = model_row("cpu auto, flash", attention="flash")
    old, new = (document("model", [model_row(), model_row("cpu auto"), flash]) for _ in range(2))
    assert len(compare(old, new).changes) == 3
    found = compare(old, new, ratios=True)
    assert [change.variant for change in found.changes] == ["cpu auto"]
    assert found.without_base == [(flash["case"], "cpu auto, flash")]
    new["rows"] = old["rows"] = [flash]
    with pytest.raises(ValueError, match=r"no row in common: .* 1 have no base in their case"):
        compare(old, new, ratios=True)


def test_a_base_of_other_length_is_an_error():
    found = document("model", [model_row(loops=(1.0, 1.0)), model_row("cpu auto")])
    with pytest.raises(ValueError, match="cpu auto has 3 rounds, and its base without has 2"):
        compare(found, found, ratios=True)


def test_a_role_alone():
    found = document("operator", [operator_row(), operator_row("lean"), operator_row("release")])
    assert [change.variant for change in compare(found, found, ratios=True, role="ours").changes] == ["cpu auto"]
    assert [change.variant for change in compare(found, found, role="rival").changes] == ["lean", "release"]
    with pytest.raises(ValueError, match="of 0 and 0 rows of role 'mine' none agree"):
        compare(found, found, role="mine")


GPU = {"gpus": ["NVIDIA H200"]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"processor": "Another"}, "processor A processor and Another"),
        ({"threads": 4}, "threads 2 and 4"),
        (GPU, "GPUs none and NVIDIA H200"),
        ({"threads": 4} | GPU, "GPUs none and NVIDIA H200; threads 2 and 4"),
    ],
)
def test_other_machines_are_refused(change, message):
    old, new = (document("operator", [operator_row()]) for _ in range(2))
    new["machine"].update(change)
    with pytest.raises(OtherMachine, match=f"different machines: {message}$"):
        compare(old, new)


def test_another_instruction_set_is_another_machine_unless_a_gpu_computes():
    old, new = document("operator", [operator_row()]), document("operator", [operator_row()], isa="avx512_bf16")
    with pytest.raises(OtherMachine, match="instruction set avx2 and avx512_bf16"):
        compare(old, new)
    for one in (old, new):
        one["machine"].update(GPU)
    assert compare(old, new).differences == ["instruction set avx2 and avx512_bf16"]


def test_other_dates_and_versions_are_told():
    old = document("operator", [operator_row()])
    new = document("operator", [operator_row()], date="2026-12-01", versions=VERSIONS | {"torch": "2.14.0", "triton": "3.8"})
    assert compare(old, new).differences == ["date 2026-11-26 and 2026-12-01", "torch 2.13.0 and 2.14.0", "triton none and 3.8"]


@pytest.mark.parametrize(
    "old, new, options, message",
    [
        (document("operator", [operator_row()]), document("model", [model_row()]), {}, "different studies: 'operator' and 'model'"),
        (document("dispatch", [{"median": 1}]),) * 2 + ({}, r"'dispatch' cannot be compared: rows\[0\] has no case, variant, p10"),
        (document("guidance", [operator_row()]),) * 2 + ({"ratios": True}, "ratios of operator and model, not of 'guidance'"),
        (document("operator", []), document("operator", [operator_row()]), {}, "no row in common: of 0 and 1 rows"),
        (document("operator", [operator_row(), operator_row()]),) * 2 + ({}, "two rows have the same case, variant: sdxl-32 bf16"),
        (document("model", [model_row(), model_row("without 2")]),) * 2
        + ({"ratios": True}, "two rows have the same case, compiled, attention: flux-dev"),
        (document("operator", [operator_row(p10=1.0)]),) * 2 + ({}, "cpu auto: p10, median and p90 must be positive and in order"),
        (document("operator", [operator_row()]),) * 2 + ({"threshold": -0.1}, "a share of at least 0"),
        (document("operator", [operator_row()]),) * 2 + ({"threshold": float("nan")}, "a share of at least 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared(old, new, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        compare(old, new, **options)
    assert not isinstance(raised.value, OtherMachine)


def test_other_studies_with_cases_and_variants_can_be_compared_in_seconds():
    found = read(RESULTS / "cpu" / "guidance.json")
    assert {change.verdict for change in comparing.compare(found, found).changes} == {SAME}
