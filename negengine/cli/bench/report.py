"""``negengine bench report``: result files as one page and one Markdown file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from negengine.bench.documents import Source
from negengine.cli.errors import one_line_errors

FILES_HELP = "Of `negengine bench model` (model.json), or of the operator benchmark (operator.json)."
OUTPUT_HELP = "Folder for report.html and report.md."


@one_line_errors
def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=FILES_HELP)],
    output: Annotated[Path, typer.Option(help=OUTPUT_HELP)],
) -> None:
    """Show results: report.html, which needs no network and no script, and report.md."""
    from negengine.bench.documents import read_all

    write(read_all(files), output)


def write(sources: Sequence[Source], output: Path) -> None:
    """The page and the Markdown file, each of which is named."""
    from negengine.bench import page
    from negengine.bench.report import report as shown

    told = shown(sources)
    written = {"report.html": page.html(told), "report.md": page.markdown(told)}
    output.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        (output / name).write_text(text, encoding="utf-8")
        typer.echo(output / name)
