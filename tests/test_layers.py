"""Which folder may import from which: only from those further down."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    ("cli", "compat"),
    ("bench", "evaluate"),
    ("diffusers", "metrics", "models"),
    ("captioners", "methods"),
    ("ops",),
    ("kernels",),
)
LAYER = {folder: number for number, folders in enumerate(LAYERS) for folder in folders}


def imported(file):
    """Folders of the package that a file imports from, at its top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        yield from (name.split(".")[1] for name in names if name.startswith("negengine."))


@pytest.mark.parametrize("folder", LAYER)
def test_imports_go_down(folder):
    files = list((ROOT / ("" if folder == "kernels" else "negengine") / folder).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(ROOT)} imports from {other}"
        for file in files
        for other in imported(file)
        if other in LAYER and other != folder and LAYER[other] <= LAYER[folder]
    ]
    assert not wrong
