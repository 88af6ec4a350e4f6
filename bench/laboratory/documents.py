"""What is written from the results: plots, the gallery, the tables of docs/evidence.md."""

from __future__ import annotations

from pathlib import Path


def write(results: Path, docs: Path) -> None: ...
