"""README, docs/beside.md and docs/compile.md: every cell of their tables names tests, which exist and are not switched off."""

import ast
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "beside.md"
COMPILE = PAGE.with_name("compile.md")
NAMED = re.compile(r"\[`(test_\w+)`\]\((\.\./tests/\S+?\.py)\)")
SWITCHED_OFF = re.compile(r"pytest\.mark\.(skip|xfail)\b|pytest\.xfail\b|pytest\.skip\(\s*\)")


def features(page, columns):
    """The rows of its tables of features, by the number of their columns under the first heading."""
    found, expected = [], None
    for line in page.read_text().splitlines():
        row = line.strip("| ").split(" | ")
        if not line.startswith("| "):
            expected = None
        elif expected is None:
            expected = columns.get(row[0])
        elif expected is not None and " --- " not in line:
            assert len(row) == expected, row
            found.append(row)
    return found


FEATURES = [*features(PAGE, {"feature": 4, "family": 8, "model family": 7}), *features(COMPILE, {"feature": 6})]


def functions_of(path):
    """Functions that pytest collects."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_test_named_on_the_page_exists():
    named = NAMED.findall(PAGE.read_text() + COMPILE.read_text())
    assert len(named) > 120
    found = {path: functions_of(PAGE.parent / path) for path in {path for _, path in named}}
    assert [(name, path) for name, path in named if name not in found[path]] == []


def test_every_test_named_in_the_readme_exists():
    root = PAGE.parent.parent
    named = re.findall(r"\[`(test_\w+)`\]\((tests/\S+?\.py)\)", (root / "README.md").read_text())
    assert len(named) >= 14
    assert [(name, path) for name, path in named if name not in functions_of(root / path)] == []


def test_no_test_is_switched_off():
    """Never run, expected to fail, or skipped without a reason; of marks with a condition pytest itself wants the reason."""
    files = (PAGE.parent.parent / "tests").rglob("*.py")
    assert [(path.name, off.group()) for path in files if (off := SWITCHED_OFF.search(path.read_text()))] == []


@pytest.mark.parametrize("row", FEATURES, ids=lambda row: row[0])
def test_every_cell_names_its_tests(row):
    assert any(cell != "-" for cell in row[1:])
    for cell in row[1:]:
        assert cell == "-" or (cell.startswith(("works: ", "refused: ")) and NAMED.search(cell)), cell


def test_every_test_of_the_subject_is_on_the_page():
    named = {(name, Path(path).name) for name, path in NAMED.findall(PAGE.read_text())}
    files = (PAGE.parent.parent / "tests" / "diffusers").glob("test_beside_*.py")
    written = {(name, path.name) for path in files for name in functions_of(path) if name.startswith("test_")}
    assert written - named == set()
