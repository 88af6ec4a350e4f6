"""``negengine demo``: embedded models without and with NegToMe, as a picture, tables and a JSON."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from negengine.cli.errors import one_line_errors
from negengine.cli.quiet import quiet_libraries
from negengine.cli.sheet import Row, sheet, stack
from negengine.environment import machine, versions

SHOWN = 4  # prompts in the picture, from first to last evenly


@one_line_errors
def demo(
    output: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("out/demo"),
    model: Annotated[
        list[str] | None, typer.Option(help="Embedded model, as mnist-flux; repeatable. Those that draw people by default.")
    ] = None,
    groups: Annotated[int, typer.Option(min=1, max=20, help="Prompts a model; a group of four images each.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
) -> None:
    """Draw the same seeds without and with NegToMe, and away from a given picture."""
    from negengine import models
    from negengine.cli import demonstration

    console = Console()
    names = list(dict.fromkeys(model or models.PEOPLE))
    for name in names:
        models.path(name)  # a missing model is an error before anything is drawn
    output.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    results: dict[str, Any] = {}
    pages: list[Image.Image] = []
    with Progress(console=console, transient=True) as progress:
        for name in names:
            shows = [demonstration.differ, *([demonstration.away] if demonstration.has_characters(name) else [])]
            task = progress.add_task(name, total=None)
            pipe = models.load(name)
            found = [show(name, pipe, groups, seed, functools.partial(_advance, progress, task)) for show in shows]
            results[name] = {part.name: part.numbers for part in found}
            pages += [sheet(part.title, part.heads, _some(part.rows), part.about) for part in found]
    picture, data = output / "demo.png", output / "demo.json"
    stack(pages).save(picture)
    told = {"date": time.strftime("%Y-%m-%d"), "seed": seed, "machine": machine(), "versions": versions(), "models": results}
    data.write_text(json.dumps(told, indent=1) + "\n")
    for name, parts in results.items():
        for numbers in parts.values():
            console.print(_table(name, numbers))
            for variant, reports in numbers["reports"].items():
                for report in reports:
                    console.print(f"{variant}: {report}", highlight=False)
    console.print(f"picture: {picture}\nnumbers: {data}", soft_wrap=True)


def _advance(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def _some(rows: list[Row]) -> list[Row]:
    """At most so many as are shown, evenly chosen."""
    return rows if len(rows) <= SHOWN else [rows[k * len(rows) // SHOWN] for k in range(SHOWN)]


def _table(name: str, numbers: Mapping[str, Any]) -> Table:
    """Means of each variant; behind those of the others the difference from the first with its interval."""
    from negengine.evaluate.tables import between, shown

    base, *others = numbers["variants"]
    table = Table(title=f"{name}, {numbers['about']}", box=SIMPLE, title_justify="left")
    table.add_column("")
    for variant in (base, *others):
        table.add_column(variant, justify="right")
    for metric in numbers["metrics"].values():
        about, means = metric["about"], metric["mean"]
        cells = [f"{shown(about, means[other])}{between(about, metric['difference'][other])}" for other in others]
        table.add_row(about["title"], shown(about, means[base]), *cells)
    table.add_row("seconds", *(f"{numbers['seconds'][variant]:.1f}" for variant in (base, *others)))
    table.caption = f"{numbers['images']} images each; in brackets the 95 % interval of the difference from {base}."
    table.caption_justify = "left"
    return table
