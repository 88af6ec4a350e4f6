"""The page shows what the rows say, and nothing else."""

import copy
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import samples
from browser import faults, screenshot
from PIL import Image

from negengine.bench import look, page, svg
from negengine.bench.documents import read, read_all
from negengine.bench.report import percent, report, size

ROOT = Path(__file__).parents[2]


class Reader(HTMLParser):
    """Elements with their attributes; tables by caption, as rows of text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.headings, self.text, self.inside = [], {}, [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "wbr":
            return
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self.caption, self.rows = "", []
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        self.inside = tag

    def handle_endtag(self, tag):
        if tag == "table":
            self.tables[self.caption] = self.rows
        self.inside = None

    def handle_data(self, data):
        if self.inside == "span":
            self.caption += data
        if self.inside in ("th", "td"):
            self.rows[-1][-1] += data
        if self.inside in ("h2", "h3"):
            self.headings.append(data)
        if self.inside not in ("style", None):
            self.text.append(data)


def shown(tmp_path, *contents):
    sources = read_all([samples.written(tmp_path / f"{number}.json", content) for number, content in enumerate(contents)])
    return report(sources)


def opened(tmp_path, *contents):
    return Reader(page.html(shown(tmp_path, *contents)))


def columns(rows, *names):
    return {row[0]: tuple(row[rows[0].index(name)] for name in names) for row in rows[1:]}


@pytest.fixture
def rows():
    return samples.flux()


def test_the_headline_is_that_of_the_rows(tmp_path, rows):
    rows[1]["full"] |= {"without": 20.0, "loop": 20.5, "overhead": 0.025}
    told = shown(tmp_path, samples.document("model", rows)).headline
    assert (told.number, told.kind) == ("+2.5 %", "extrapolated")
    assert "7 of them active" in told.notes[0]
    assert samples.HOW[1:] in told.notes[1]
    assert [line[1:] for line in told.table.rows] == [
        ("+2.5 %", "20.00 s → 20.50 s, extrapolated"),
        ("+3.5 %", "13.05 s → 13.50 s, extrapolated"),
        ("+3.8 %", "13.2 s → 13.7 s, reported"),
        ("+3.6 %", "30.62 s → 31.71 s, reported"),
    ]


NONE = "not distinguishable from none here"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, "0.3 %: smaller differences say nothing"),
        ({"noise": 0.03}, f"3.0 %: what was added to it, +1.9 % to +2.4 %, is {NONE}"),
        ({"noise_p10": -0.04, "noise_p90": 0.01}, f"4.0 %: what was added to it, +1.9 % to +2.4 %, is {NONE}"),
        ({"overhead_p10": -0.001}, f"0.3 %: what was added to it, −0.1 % to +2.4 %, is {NONE}"),
    ],
)
def test_a_headline_that_is_not_distinguishable_from_none_is_called_so(tmp_path, rows, changes, said):
    rows[1] |= changes
    told = shown(tmp_path, samples.document("model", rows)).headline
    assert told.kind == ("extrapolated" if not changes else f"extrapolated, {NONE}")
    assert told.notes[2] == f"The measured loop without a method, timed twice a round, differs by up to {said}."


def test_a_toy_model_does_not_stand_beside_the_paper(tmp_path, rows):
    toy = [row | {"model": "mnist-flux", "case": "toy", "depth": "full", "full": None} for row in rows]
    told = shown(tmp_path, samples.document("model", toy)).headline
    assert [line[0] for line in told.table.rows] == ["ours (triton auto)", "the published algorithm, in the same run"]
    assert "mnist-flux is a toy model" in told.notes[1]
    assert "reported" not in told.figure.caption
    assert shown(tmp_path, samples.document("model", [*toy, *rows])).headline.title.endswith("flux-dev")


def test_the_headline_names_its_machine_and_file_among_several(tmp_path, rows):
    both = samples.document("model", rows, **samples.H100), samples.operator(machine=samples.MACHINE)
    assert shown(tmp_path, *both).headline.notes[1] == "Measured on NVIDIA H100 80GB HBM3: 0.json."
    assert "0.json" not in " ".join(shown(tmp_path, both[0]).headline.notes)


@pytest.mark.parametrize("depth, kind", [("full", "measured"), ("2+2", "measured on 2+2 blocks")])
def test_what_was_measured_is_not_called_extrapolated(tmp_path, depth, kind):
    rows = [row | {"full": None, "depth": depth} for row in samples.flux()]
    told = shown(tmp_path, samples.document("model", rows)).headline
    assert (told.number, told.kind) == (percent(rows[1]["overhead"]), kind)
    assert "hollow" not in told.figure.wide
    assert "extrapolated" not in " ".join(line[2] for line in told.table.rows)


def test_only_what_is_extrapolated_is_outlined(tmp_path):
    figure = shown(tmp_path, samples.models()).headline.figure
    for drawing in (figure.wide, figure.narrow):
        kinds = re.findall(r'class="(bar [a-z ]+)"', drawing)
        assert kinds == ["bar ours hollow", "bar published hollow", "bar reported", "bar reported"]


def test_the_headline_is_of_flux_and_of_the_whole_model_where_it_can_be(tmp_path):
    document = samples.models()
    document["rows"].sort(key=lambda row: row["model"], reverse=True)
    assert document["rows"][0]["model"] == "sdxl-base"
    assert shown(tmp_path, document).headline.title.endswith("flux-dev")
    lone = [row for row in document["rows"] if row["model"] == "sdxl-base" and row["role"] != "published"]
    told = shown(tmp_path, samples.document("model", lone)).headline
    assert told.title.endswith("sdxl-base")
    assert told.notes[-1] == "The published algorithm did not run in this case."
    assert len(told.table.rows) == 3


def test_no_headline_where_negtome_did_not_run(tmp_path, rows):
    others = [row for row in rows if row["method"] != "negtome"]
    assert shown(tmp_path, samples.document("model", others)).headline is None
    found = opened(tmp_path, samples.document("model", others))
    assert "Time that other methods add, in percent" in found.headings
    assert "Time that NegToMe adds, in percent" not in found.headings
    assert "Time of each step" in found.headings


@pytest.mark.parametrize(
    "encoders, vae, said",
    [
        (False, False, "Text encoders and VAE are not within the time."),
        (False, True, "The time includes the VAE."),
        (True, True, "The time includes text encoders and the VAE."),
    ],
)
def test_what_is_within_the_time_is_told(tmp_path, rows, encoders, vae, said):
    rows = [row | {"text_encoders": encoders, "vae": vae} for row in rows]
    (note,) = shown(tmp_path, samples.document("model", rows)).sections[0].notes
    assert note == f"2 images, 1024 x 1024, bf16, 2+2 blocks, not the whole model, 4 steps, 5 rounds. {said}"


def test_every_variant_is_shown_as_measured(tmp_path, rows):
    rows[1] |= {"median": 0.51234, "p10": 0.5, "p90": 0.53, "overhead": 0.0678, "overhead_active_step": 0.1111, "merged_share": 0.5}
    table = opened(tmp_path, samples.document("model", rows)).tables["Every variant, as measured"]
    wanted = ("loop", "10th to 90th percentile", "added", "active step adds", "merged", "graphs, recompiles")
    found = columns(table, *wanted)
    assert list(found) == [row["variant"] for row in rows]
    assert found["triton auto"] == ("512.3 ms", "500.0 ms to 530.0 ms", "+6.8 %", "+11.1 %", "50.0 %", "–")
    assert found["without"][2:5] == ("–", "–", "–")
    assert table[0][:2] == ["variant", "added"]
    assert found["published, blocks"][-1] == "6, 1"


def test_bars_are_as_long_as_their_values(tmp_path, rows):
    rows[1]["overhead"], rows[3]["overhead"] = 0.02, 0.05
    figure = shown(tmp_path, samples.document("model", rows)).sections[0].figures[0]
    for drawing in (figure.wide, figure.narrow):
        lengths = [
            float(length) for length in re.findall(r'width="([\d.]+)" height="22" rx="3" class="bar (?:ours|published)"', drawing)
        ]
        assert lengths[2] / lengths[0] == pytest.approx(2.5, rel=0.01)


def test_whiskers_are_the_percentiles_over_the_base(tmp_path, rows):
    rows[1] |= {"overhead": 0.02, "overhead_p10": 0.01, "overhead_p90": 0.04}
    figure = shown(tmp_path, samples.document("model", rows)).sections[0].figures[0]
    (zero,) = re.findall(r'x1="([\d.]+)" x2="[\d.]+" y1="0" y2="[\d.]+" class="axis"', figure.wide)
    bar = re.search(r'x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="22"', figure.wide)
    start, end = re.search(r'x1="([\d.]+)" x2="([\d.]+)" y1="[\d.]+" y2="[\d.]+" class="spread"', figure.wide).groups()
    unit = float(bar[2]) / 2
    assert float(bar[1]) == pytest.approx(float(zero), abs=0.2)
    assert (float(start) - float(zero)) / unit == pytest.approx(1, rel=0.02)
    assert (float(end) - float(zero)) / unit == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize(
    "active", [[True, True, False, False], [False, True, True, False], [True, False, False, True], [False] * 4]
)
def test_active_steps_are_shaded(active):
    series = [svg.Series("ours", "ours", [(float(step), 1.0 + step / 10, 1.0, 2.0) for step in range(1, 5)])]
    for width in (svg.WIDE, svg.NARROW):
        drawing = svg.steps("steps", series, active, width, look.axis_seconds)
        shades = [
            (float(x), float(x) + float(w))
            for x, w in re.findall(r'x="([\d.]+)" y="[\d.]+" width="([\d.]+)" [^>]*class="active"', drawing)
        ]
        places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawing)][:4]
        assert [any(start < place < end for start, end in shades) for place in places] == active


def test_steps_are_the_medians_of_the_rounds(tmp_path, rows):
    for row in rows[:4]:
        row["step_seconds"] = [[1.0, 1.0, 1.0, 1.0]] * 5
    rows[1]["step_seconds"] = [[3.0, 2.0, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0], [9.0, 2.0, 1.0, 1.0]]
    figures = {figure.title: figure for figure in shown(tmp_path, samples.document("model", rows)).sections[0].figures}
    figure = figures["Time of each step"]
    assert "(2 of 4)" in figure.caption
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', figure.wide)]
    assert (heights[3] - heights[0]) / (heights[3] - heights[1]) == pytest.approx(2, rel=0.01)
    assert heights[2] == heights[3] > heights[1]


def test_scaling_is_shown_over_images_and_over_resolution(tmp_path):
    section = shown(tmp_path, samples.models()).sections[0]
    assert [figure.title for figure in section.figures] == [
        "flux-dev, 1024 x 1024 pixels: time added, over images",
        "flux-dev, 2 images: time added, over pixels of a side",
    ]
    values = [row["full"]["overhead"] for images in (4, 8) for row in samples.scaled(images, 1024)[1:]]
    written = re.findall(r'class="point \w+">([^<]+)<', section.figures[0].wide)
    assert sorted(written) == sorted(map(percent, [0.041 * 7 / 25, 0.124 * 7 / 25, *values]))
    assert len(section.tables[0].rows) == 6


def test_cases_that_differ_in_more_are_in_no_line(tmp_path):
    document = samples.models()
    for row in document["rows"]:
        if row["images"] > 2 or row["size"] != 1024:
            row["dtype"] = f"fp{row['images']}{row['size']}"
    assert not shown(tmp_path, document).sections[0].figures


def test_lines_lead_where_the_values_lie():
    points = [(2.0, 1.0, 1.0, 1.0), (4.0, 2.0, 2.0, 2.0), (8.0, 4.0, 4.0, 4.0)]
    drawing = svg.lines("x", [svg.Series("ours", "ours", points)], "images", svg.WIDE, look.axis_percent, str)
    found = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawing)]
    assert found[1][0] - found[0][0] == pytest.approx(found[2][0] - found[1][0], abs=0.2)
    assert found[1][1] - found[2][1] == pytest.approx(2 * (found[0][1] - found[1][1]), abs=0.3)


def test_memory_and_gpu(tmp_path, rows):
    rows[0]["peak_bytes"], rows[1]["peak_bytes"] = 20_000_000_000, 20_250_000_000
    rows[1]["gpu"]["energy_j_per_image"] = 3245.0
    found = opened(tmp_path, samples.document("model", rows))
    table = columns(
        found.tables["Memory and GPU during the loops"], "peak memory", "over without", "clock", "energy added", "throttled by"
    )
    assert table["triton auto"] == ("20.25 GB", "+250 MB", "1,710 MHz", "+10.0 %", "power cap")
    assert table["without"][1] == table["without"][3] == table["dng"][2] == "–"
    assert "20.25 GB (+250 MB)" in found.text


def test_what_is_not_there_is_left_out(tmp_path, rows):
    empty = {
        "gpu": None,
        "peak_bytes": None,
        "computed_bytes": None,
        "full": None,
        "graphs": None,
        "merged_share": None,
    }
    few = [row | empty | {"depth": "full"} for row in rows[:4]]
    found = opened(tmp_path, samples.document("model", few))
    assert not {"Memory at its peak", "Time that other methods add, in percent", "Left out", "All cases"} & {
        heading.strip() for heading in found.headings
    }
    assert set(found.tables) == {"Every variant, as measured", "What was measured, where and with what"}
    assert not {"merged", "graphs, recompiles"} & set(found.tables["Every variant, as measured"][0])


def test_operator_rows(tmp_path):
    found = opened(tmp_path, samples.operator())
    table = columns(
        found.tables["flux-1024 bf16 paper half"], "median", "release / it", "gemm / it", "of the floor", "memory added"
    )
    assert table["triton auto"] == ("482.1 µs", "3.12", "0.83", "91.6 %", "599 kB")
    assert table["gemm"] == ("400.0 µs", "–", "–", "98.0 %", "–")
    (fold,) = [place for place, (tag, _) in enumerate(found.elements) if tag == "details"]
    first = [tag for tag, _ in found.elements].index("table")
    assert [tag for tag, _ in found.elements].index("svg") < fold < first


def test_operator_bars_are_one_figure_a_shape(tmp_path):
    document = samples.operator()
    others = [row | {"case": "flux-1024 fp32 paper half", "dtype": "fp32", "median": 9.0, "p90": 9.5} for row in document["rows"]]
    others += [row | {"case": "2x16x8 fp32 release half", "shape": "2x16x8", "dtype": "fp32"} for row in document["rows"]]
    section = shown(tmp_path, document | {"rows": [*others, *document["rows"]]}).sections[0]
    assert [figure.title for figure in section.figures] == ["flux-1024: time of one call", "2x16x8: time of one call"]
    assert "bf16, paper matching, gate half" in section.figures[0].caption
    written = re.findall(r'class="value">([^<]+)<', section.figures[0].wide)
    assert written == ["400.0 µs", "482.1 µs", "976.0 µs", "1.506 ms"]
    assert "3.12 times as fast as release" in section.figures[0].wide
    assert len(section.tables) == 3
    assert section.folded


def test_the_value_of_a_bar_stands_at_its_end():
    rows = [svg.Bar("a", "", 3.0, "+3", "ours", 2.0, 4.0), svg.Bar("b", "", -2.0, "−2", "ours", -3.0, 1.0)]
    for width in (svg.WIDE, svg.NARROW):
        drawing = svg.bars("x", rows, width)
        ends = [
            sorted(map(float, found))
            for found in re.findall(r'x1="([\d.]+)" x2="([\d.]+)" y1="[\d.]+" y2="[\d.]+" class="spread"', drawing)
        ]
        longest = [max(part, key=lambda pair: pair[1] - pair[0]) for part in (ends[:3], ends[3:])]
        right, left = (float(x) for x in re.findall(r'<text x="([\d.]+)" y="[\d.]+" class="value', drawing))
        assert right == pytest.approx(longest[0][1] + 10, abs=0.2)
        assert left == pytest.approx(longest[1][0] - 10, abs=0.2)
        assert left > 20


@pytest.mark.parametrize(
    "ticks, written",
    [
        ([0.095, 0.1, 0.105], ["95 ms", "100 ms", "105 ms"]),
        ([0.0, 0.5, 1.0, 1.5], ["0.0 s", "0.5 s", "1.0 s", "1.5 s"]),
        ([0.00998, 0.01, 0.01002], ["9.98 ms", "10.00 ms", "10.02 ms"]),
    ],
)
def test_an_axis_has_one_unit_and_one_number_of_digits(ticks, written):
    assert look.axis_seconds(ticks) == written
    assert look.axis_percent([-0.5, 0.0, 0.5]) == ["−0.5 %", "0.0 %", "0.5 %"]


def test_paths_break_after_slashes(tmp_path):
    assert page.paths("in /tmp/a-b/model.json, release / it <b>") == "in /tmp/<wbr>a-b/<wbr>model.json, release / it &lt;b&gt;"
    (tmp_path / "some").mkdir()
    path = samples.written(tmp_path / "some" / "operator.json", samples.operator())
    assert "some/<wbr>operator.json" in page.html(report([read(path)]))


def test_what_several_files_left_out_is_told_once(tmp_path):
    files = [samples.operator(left_out={"flash-kmeans": "not installed"}) for _ in range(2)]
    assert opened(tmp_path, *files).tables["What was not measured, and why"][1] == ["not installed", "flash-kmeans"]


def test_machine_versions_and_what_was_left_out(tmp_path):
    found = opened(tmp_path, samples.models(), samples.operator(date="2026-11-20", isa="avx2"))
    table = {row[0]: row[1:] for row in found.tables["What was measured, where and with what"]}
    assert table["date"] == ["2026-11-26", "2026-11-20"]
    assert table["instruction set"] == ["–", "avx2"]
    assert table["torch"] == ["2.11.0"] * 2
    assert "xformers" not in table
    assert ["xformers is not installed", "xformers"] in found.tables["What was not measured, and why"]
    assert "2026-11-20 to 2026-11-26" in "".join(found.text)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    paths = []
    for machine in ("one", "two"):
        (tmp_path / machine).mkdir()
        paths.append(samples.written(tmp_path / machine / "model.json", samples.document("model", samples.flux())))
    titles = [section.title for section in report(read_all(paths)).sections]
    assert titles[0].endswith(f"({paths[0]})")
    assert titles[1].endswith(f"({paths[1]})")


EVIL = """<script>alert("1")</script>'|`*{{ 7 * 7 }}"""


FIXED = ("what", "date", "role", "method", "compiled", "dtype", "matching", "gate")  # the schema or the report knows their values


def poisoned(value, key=""):
    if isinstance(value, dict):
        return {(name if key != "left_out" else EVIL + name): poisoned(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner, key) for inner in value]
    return value + EVIL if isinstance(value, str) and key not in FIXED else value


def test_everything_from_a_file_is_escaped(tmp_path):
    poison = poisoned(samples.models()), poisoned(samples.operator())
    text = page.html(shown(tmp_path, *poison))
    clean = Reader(page.html(shown(tmp_path, samples.models(), samples.operator())))
    kinds = [[tag for tag, _ in found.elements] for found in (Reader(text), clean)]
    assert set(kinds[0]) == set(kinds[1])
    assert kinds[0].count("svg") == kinds[1].count("svg")
    assert "<script" not in text
    assert "{{ 7 * 7 }}" in text
    names = {name for tag, attributes in Reader(text).elements for name in attributes}
    assert names == {name for tag, attributes in clean.elements for name in attributes}
    told = page.markdown(shown(tmp_path, *poison))
    assert "<script" not in re.sub(r"\\<", "", told)
    widths = {line.count("|") - line.count("\\|") for line in told.splitlines() if line.startswith("| triton")}
    plain = page.markdown(shown(tmp_path, samples.models(), samples.operator()))
    assert widths == {line.count("|") for line in plain.splitlines() if line.startswith("| triton")}


def test_the_page_needs_nothing_but_itself(tmp_path):
    text = page.html(shown(tmp_path, samples.models(), samples.operator()))
    assert not re.search(r"https?:|@import|url\(|<link|<script|<img|\bsrc=", text)
    assert {link[0] for link in re.findall(r'href="([^"]+)"', text)} == {"#"}
    assert str(tmp_path) not in text


def test_tables_and_drawings_speak_to_screen_readers(tmp_path):
    found = opened(tmp_path, samples.models(), samples.operator())
    tags = [tag for tag, _ in found.elements]
    assert tags.count("table") == tags.count("caption") > 10
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in found.elements if tag == "th")
    assert all(attributes["role"] == "img" and attributes["aria-label"] for tag, attributes in found.elements if tag == "svg")
    links = {attributes["href"][1:] for tag, attributes in found.elements if tag == "a"}
    assert links <= {attributes.get("id") for _, attributes in found.elements}


def test_markdown_holds_the_tables_of_the_page(tmp_path):
    told = shown(tmp_path, samples.models(), samples.operator())
    text = page.markdown(told)
    assert "**+1.1 %** (extrapolated) added by NegToMe" in text
    parts = text.split("\n## ")[1:]
    assert len(parts) == len(told.sections)
    for part, section in zip(parts, told.sections, strict=True):
        blocks = [block.splitlines() for block in part.split("\n\n") if block.startswith("|")]
        assert len(blocks) == len(section.tables)
        for block, table in zip(blocks, section.tables, strict=True):
            lines = [f"| {' | '.join(map(page._plain, cells))} |" for cells in (table.head, *table.rows)]
            assert [block[0], *block[2:]] == lines


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench" / "results").glob("*/operator*.json")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_committed_results_are_read(path):
    document = json.loads(path.read_text())
    found = Reader(page.html(report([read(path)])))
    for row in document["rows"]:
        assert row["variant"] in columns(found.tables[row["case"]])


def changed(key, value, number=0, what=samples.models):
    document = what()
    document["rows"][number][key] = value
    return document


def lacking(key):
    document = samples.models()
    del document["rows"][1][key]
    return document


OURS = f"({samples.CASE}, triton auto): "
REFUSED = {
    "another study": (
        samples.document("pipelines", [{}]),
        "holds results of 'pipelines'; a report shows those of model and operator",
    ),
    "no rows": (samples.document("model", []), "has no rows: nothing was measured"),
    "a key less": (lacking("overhead"), f"rows[1] {OURS}'overhead' is a required property"),
    "true images": (changed("images", True, 1), f"rows[1].images {OURS}True is not of type 'integer'"),
    "no overhead": (changed("overhead", None, 1), f"rows[1].overhead {OURS}None is not of type 'number'"),
    "steps without a word": (
        changed("active", [True], 1),
        "triton auto: active must have an entry for each of 4 steps, not [True]",
    ),
    "a round too short": (changed("step_seconds", [[1.0]], 1), "a round of step_seconds must have an entry for each of 4 steps"),
    "no base": (
        changed("compiled", "whole", 1),
        f"case {samples.CASE!r} lacks a row without a method to compare 'triton auto' with",
    ),
    "a variant twice": (
        changed("variant", "triton auto", 2),
        f"case {samples.CASE!r} has more than one row of variant 'triton auto'",
    ),
    "an operator's twice": (changed("variant", "lean", 1, samples.operator), "half' has more than one row of variant 'lean'"),
}


@pytest.mark.parametrize("content", [samples.models(), samples.operator()], ids=["model", "operator"])
def test_the_samples_have_the_schema(tmp_path, content):
    assert read(samples.written(tmp_path / "sample.json", content)).document == content


@pytest.mark.parametrize("content, message", REFUSED.values(), ids=REFUSED)
def test_what_is_no_result_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(samples.written(tmp_path / "model.json", content))


def test_a_file_named_twice_is_refused(tmp_path):
    path = samples.written(tmp_path / "model.json", samples.models())
    with pytest.raises(ValueError, match="is named twice"):
        read_all([path, tmp_path / "." / "model.json"])


@pytest.mark.parametrize("low, high", [(0, 0.034), (-0.4, 51.5), (99.7, 113.2), (5, 5), (0, 0), (-3, -1), (1e-6, 2.3e-6)])
def test_axes_enclose_their_values_with_few_round_ticks(low, high):
    ticks = svg.nice(low, high)
    assert ticks[0] - 1e-12 <= low <= high <= ticks[-1] + 1e-12
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


def test_labels_at_one_height_are_moved_apart():
    heights = svg.apart([100, 101, 99, 200], 0, 200)
    assert sorted(heights, reverse=True) == [200, *sorted(heights, reverse=True)[1:]]
    ordered = sorted(heights)
    assert all(below - above >= svg.LINE for above, below in itertools.pairwise(ordered))
    assert heights.index(min(heights)) == 2
    crowded = sorted(svg.apart([198, 199, 200], 0, 200))
    assert crowded == [160, 180, 200]


@pytest.mark.parametrize("value, text", [(0.0114, "+1.1 %"), (-0.002, "−0.2 %"), (1.03, "+103 %"), (0.0, "+0.0 %")])
def test_percent(value, text):
    assert percent(value) == text


@pytest.mark.parametrize("value, text", [(23.4e9, "23.40 GB"), (-37e6, "−37 MB"), (598528, "+599 kB"), (-4096, "−4 kB")])
def test_size(value, text):
    assert size(value, "+" if text[0] in "+−" else "") == text


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def schemes(text):
    """Light, dark and print: the colours by name."""
    return [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL)]


def test_colours_can_be_told_from_their_ground(tmp_path):
    light, dark, printed = found = schemes(page.html(shown(tmp_path, samples.models())))
    assert light["ours"] == printed["ours"] == look.BLUE
    assert dark["ours"] == look.SKY
    for colours in found:
        grounds = [colours[name] for name in ("paper", "card", "active", "band")]
        assert min(contrast(colours[name], ground) for name in ("ink", "soft") for ground in grounds) >= 4.5
        assert min(contrast(colours[name], ground) for name in ("ours-text", "published-text") for ground in grounds[:2]) >= 4.5
        assert (
            min(contrast(colours[name], ground) for name in ("ours", "published", "other", "without") for ground in grounds[:2])
            >= 3
        )


def long_names():
    """Names and numbers at which a drawing could break."""
    document = samples.models()
    for row in document["rows"]:
        if row["variant"] != "without":
            row["variant"] += ", reduce-overhead, xformers, " + "a name without an end " * 3
    first = copy.deepcopy(samples.flux())
    for row in first:
        row["case"], row["overhead"] = "slower and faster", -row["overhead"]
        row |= {"p10": 0.5 * row["p10"], "steps": 25, "active": [step < 7 or step == 20 for step in range(25)]}
        row["step_seconds"] = [[seconds[step % 4] for step in range(25)] for seconds in row["step_seconds"]]
    return document | {"rows": document["rows"] + first}


@pytest.mark.parametrize("content", [samples.models, pytest.param(long_names, marks=pytest.mark.exhaustive)])
def test_the_page_fits_every_width(tmp_path, content):
    text = page.html(shown(tmp_path, content(), samples.operator()))
    assert faults(text, [320, 390, 680, 800, 1280, 2000], tmp_path) == []


@pytest.mark.exhaustive  # one more start of a browser
def test_a_printed_page_fits_its_paper(tmp_path):
    """A4 and Letter within their usual margins, where nothing scrolls."""
    text = page.html(shown(tmp_path, samples.models(), samples.operator()))
    assert faults(text.replace("@media print", "@media all"), [718, 740], tmp_path) == []


def test_what_does_not_fit_is_noticed(tmp_path):
    text = page.html(shown(tmp_path, samples.models()))
    wide = '<p style="width: 500px">too wide</p><script>lost()</script><img src="data:image/png;base64,AAAA">'
    drawing = '<svg viewBox="0 0 50 20"><text x="10" y="15">long text</text><text x="12" y="15">another</text></svg>'
    figure = f"<figure>none</figure>{drawing}</main>"
    found = "\n".join(faults(text.replace("</main>", wide + figure), [390], tmp_path))
    for what in (
        "wide What negative",
        "beyond the edge: too wide",
        "out of its drawing: long",
        'on "another": long',
        "lost is not defined",
    ):
        assert what in found


@pytest.mark.exhaustive  # four starts of a browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme, number", [("light", 0), ("dark", 1)])
def test_screenshots_have_the_colours_of_their_scheme(tmp_path, scheme, number, width):
    text = page.html(shown(tmp_path, samples.models(), samples.operator()))
    file = tmp_path / "report.html"
    file.write_text(text, encoding="utf-8")
    image = Image.open(screenshot(file, scheme, width, 2400)).convert("RGB")
    assert image.size == (width, 2400)
    colours = schemes(text)[number]
    seen = {bytes(colour) for _, colour in image.getcolors(maxcolors=1 << 24)}
    assert bytes(image.getpixel((1, 1))) == bytes.fromhex(colours["paper"][1:])
    assert {bytes.fromhex(colours[name][1:]) for name in ("card", "ink", "ours", "published", "reported")} <= seen
