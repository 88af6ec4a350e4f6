"""What an evaluation leaves: evaluate.json, evaluate.md, evaluate.png, and the tables on the terminal."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Column
from rich.table import Table as Shown

from negengine.evaluate import plots, results, tables

STEM = "evaluate"


def prepare(output: Path) -> None:
    """Make the folder before anything is drawn or measured.

    Raises:
        ValueError: it holds results already, or cannot be written to.
    """
    there = next((file for ending in ("json", "md", "png") if (file := output / f"{STEM}.{ending}").exists()), None)
    if there is not None:
        raise ValueError(f"{there} exists; choose another --output, or remove it")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written to: {error.strerror}") from error


def leave(told: Mapping[str, Any], output: Path, plot: bool) -> None:
    """Write the files into a folder that is prepared, and show the tables."""
    results.write(told, output / f"{STEM}.json")
    page = output / f"{STEM}.md"
    page.write_text(tables.markdown(told, f"negengine {shlex.join(sys.argv[1:])}"), encoding="utf-8")
    if plot:
        plots.plot(told, output / f"{STEM}.png")
    console = Console()
    for table in tables.tables(told):
        columns = [Column(name, justify="right" if place else "left", overflow="fold") for place, name in enumerate(table.columns)]
        shown = Shown(*columns, title=escape(table.title), box=SIMPLE, title_justify="left")
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
        if table.note:
            console.print(table.note, style="dim", highlight=False, markup=False)
    for remark in told["remarks"]:
        console.print(remark, highlight=False, markup=False)
    written = [f"{STEM}.json", page.name, *([f"{STEM}.png"] if plot else [])]
    console.print(f"{', '.join(written)} in {output}", soft_wrap=True, highlight=False)
