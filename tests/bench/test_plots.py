"""The pictures show what the rows say."""

import pytest

from negengine.bench import plots
from negengine.bench.results import Results
from negengine.bench.suite import Row


def row(variant, role, median, **other):
    usual = dict.fromkeys(Row.__dataclass_fields__)
    sizes = {"shape": "small", "images": 3, "tokens": 64, "channels": 48, "dtype": "fp32", "matching": "paper", "gate": "half"}
    times = {"median": median, "p10": 0.9 * median, "p90": 1.2 * median, "floor": 1e-3, "ratio": {}, "ratio_p10": {}}
    return usual | sizes | {"variant": variant, "role": role} | times | other


@pytest.fixture
def figures(monkeypatch):
    """What is drawn, before it is closed."""
    drawn, save = [], plots._save

    def keep(figure, path):
        drawn.append([[text.get_text() for text in [*ax.texts, *ax.get_yticklabels()]] + [ax.get_xlabel()] for ax in figure.axes])
        return save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return drawn


@pytest.fixture
def document(tmp_path):
    results = Results(tmp_path / "operator.json", "operator")
    results.add([row("release", "rival", 9e-3), row("cpu auto", "ours", 2e-3), row("gemm", "search", 3e-3, floor=None)])
    results.add([row("cpu auto", "ours", 4e-3, dtype="bf16")])
    return results.document


def png(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 10_000


def test_time_against_floor(document, tmp_path, figures):
    png(plots.time_against_floor(document, tmp_path / "floor.png"))
    first, second = figures[0]
    assert first[:3] == ["2 ms", "3 ms", "9 ms"]
    assert first[3:6] == ["cpu auto", "gemm (search only)", "release"]
    assert "4 ms" in second


def test_scaling(tmp_path, figures):
    results = Results(tmp_path / "scaling.json", "scaling")
    for axis, key in (("N", "images"), ("T", "tokens"), ("D", "channels")):
        for size in (4, 8):
            results.add([row(v, r, size * 1e-3, axis=axis, **{key: size}) for v, r in (("cpu auto", "ours"), ("gemm", "search"))])
    png(plots.scaling(results.document, tmp_path / "scaling.png", "fp32"))
    assert [ax[-1] for ax in figures[0]] == [
        "images N (log), at T = 64, D = 48",
        "tokens T (log), at N = 3, D = 48",
        "channels D (log), at N = 3, T = 64",
    ]


def test_overhead(tmp_path, figures):
    results = Results(tmp_path / "pipelines.json", "pipelines")
    about = {"pipeline": "mnist-flux", "images": 8, "steps": 25}
    for variant, median in (("without", 1.0), ("cpu auto", 1.1), ("published", 1.5)):
        results.add([about | {"variant": variant, "median": median, "overhead": median - 1}])
    png(plots.overhead([results.document], tmp_path / "end-to-end.png"))
    assert figures[0][0][:2] == ["+10.0 %  (1 s → 1.1 s)", "+50.0 %  (1 s → 1.5 s)"]


def test_colours_and_marks_tell_all_variants_apart():
    names = [*plots.STYLES, "cpu auto", "cpu bf16", "cpu int8", "torch auto", "triton auto", "triton fp8"]
    assert len(set(plots.style(names).values())) == len(names)


@pytest.mark.parametrize("value, text", [(1.5, "1.5 s"), (0.0025, "2.5 ms"), (25e-6, "25 µs"), (0.9999, "1 s"), (3e-8, "30 ns")])
def test_seconds(value, text):
    assert plots.seconds(value) == text
