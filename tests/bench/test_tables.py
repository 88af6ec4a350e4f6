"""The tables of the README and of docs are those of the committed results."""

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
    for name in ("README.md", "docs/kernels.md", "docs/kernels-triton.md", "bench/tables.py", "bench/results/cpu"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", ROOT / name, target], check=True)
    return tmp_path


def test_other_results_are_noticed_and_written(copy):
    results = copy / "bench" / "results" / "cpu" / "operator.json"
    results.write_text(results.read_text().replace('"peak_reached": 0.', '"peak_reached": 0.5'))
    before = (copy / "README.md").read_text()
    stale = tables(copy, "--check")
    assert stale.returncode == 1
    assert "README.md: operator" in stale.stdout
    assert (copy / "README.md").read_text() == before
    assert tables(copy).returncode == 0
    assert (copy / "README.md").read_text() != before
    assert tables(copy, "--check").returncode == 0


def test_a_missing_mark_is_an_error(copy):
    readme = copy / "README.md"
    readme.write_text(readme.read_text().replace("<!-- operator", "<!-- nothing"))
    done = tables(copy)
    assert done.returncode == 1
    assert "no table named 'operator'" in done.stderr
