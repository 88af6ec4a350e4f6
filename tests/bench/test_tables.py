"""The tables of the README and of docs are those of the committed results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tables(root, *arguments):
    return subprocess.run([sys.executable, root / "bench" / "tables.py", *arguments], capture_output=True, text=True)


def test_no_figure_is_stale():
    done = tables(ROOT, "--check")
    assert done.returncode == 0, f"run `python bench/tables.py`: {done.stdout}{done.stderr}"


@pytest.fixture
def copy(tmp_path):
    names = ("measured", "kernels", "kernels-triton", "predicted", "guidance-kernels")
    documents = tuple(f"docs/{name}.md" for name in names)
    for name in (*documents, "bench/tables.py", "bench/results"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", ROOT / name, target], check=True)
    return tmp_path


def test_other_results_are_noticed_and_written(copy):
    results = copy / "bench" / "results" / "cpu" / "operator.json"
    results.write_text(results.read_text().replace('"peak_reached": 0.', '"peak_reached": 0.5'))
    before = (copy / "docs" / "measured.md").read_text()
    stale = tables(copy, "--check")
    assert stale.returncode == 1
    assert "docs/measured.md: operator" in stale.stdout
    assert (copy / "docs" / "measured.md").read_text() == before
    assert tables(copy).returncode == 0
    assert (copy / "docs" / "measured.md").read_text() != before
    assert tables(copy, "--check").returncode == 0


def test_a_missing_mark_is_an_error(copy):
    readme = copy / "docs" / "measured.md"
    readme.write_text(readme.read_text().replace("<!-- operator", "<!-- nothing"))
    done = tables(copy)
    assert done.returncode == 1
    assert "no table named 'operator'" in done.stderr


def test_a_gpu_s_results_stand_beside_its_predictions(copy):
    text = (copy / "docs" / "predicted.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| A100 SXM | flux-1024 |"))
    assert line.count("not yet measured") == 2
    row = {"shape": "flux-1024", "dtype": "bf16", "matching": "paper", "gate": "half", "backend": "triton", "search": "auto"}
    row |= {"variant": "triton auto", "median": 0.0005678, "ratio": {"gemm": 0.712}}
    other = row | {"shape": "flux-768", "gate": "all"}
    results = copy / "bench" / "results" / "a100-sxm4-80gb" / "operator.json"
    results.parent.mkdir()
    results.write_text(json.dumps({"rows": [other, row]}))
    stale = tables(copy, "--check")
    assert stale.returncode == 1
    assert stale.stdout.splitlines() == ["docs/predicted.md: predicted"]
    assert tables(copy).returncode == 0
    lines = (copy / "docs" / "predicted.md").read_text().splitlines()
    changed = [new for new, old in zip(lines, text.splitlines(), strict=True) if new != old]
    assert [line.split(" | ")[:2] for line in changed] == [["| A100 SXM", "flux-1024"]]
    assert "| 0.568 |" in changed[0]
    assert changed[0].endswith("| 0.71 |")


def test_the_predictions_are_of_these_sources():
    """Compiling takes minutes: the prediction names the sources that it was made from."""
    done = subprocess.run([sys.executable, ROOT / "bench" / "predict.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
