"""The tables of the README and of docs are those of the committed results."""

import importlib.util
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
    names = ("measured", "kernels", "kernels-triton", "predicted", "guidance-kernels", "dng", "host-cost", "evidence")
    documents = tuple(f"docs/{name}.md" for name in names)
    scripts = tuple(f"bench/{name}.py" for name in ("tables", "evidence_tables", "evidence_claims"))
    for name in (*documents, *scripts, "docs/gallery.html", "bench/laboratory", "bench/results"):
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


def test_the_study_of_dng_is_in_its_tables(copy):
    results = copy / "bench" / "results" / "cpu" / "dng.json"
    document = json.loads(results.read_text())
    for row in document["rows"]:
        row["vendi"] = 1.5
        if row["cell"].startswith("DNG, scale 10") and row["sampler"] == "Euler":
            row["stayed"], row["read"] = 77, "0" * 200
    results.write_text(json.dumps(document))
    stale = tables(copy, "--check")
    assert stale.stdout.splitlines() == ["docs/dng.md: dng", "docs/dng.md: dng three"]
    assert tables(copy).returncode == 0
    text = (copy / "docs" / "dng.md").read_text()
    assert "| DNG, scale 10 | 77 | 74 |" in text
    assert text.count(" | 1.50 |") == 3


def test_pairs_count_the_images_that_one_of_two_rows_keeps(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    spec = importlib.util.spec_from_file_location("tables", ROOT / "bench" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain, one, other = ({"read": text} for text in ("01234567", "01239567", "91214967"))
    assert module.kept_alone(one, other, plain) == (2, 0)


def test_the_predictions_are_of_these_sources():
    """Compiling takes minutes: the prediction names the sources that it was made from."""
    done = subprocess.run([sys.executable, ROOT / "bench" / "predict.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
