"""``negengine bench compare``: two result files of one study side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from negengine.bench import compare as comparing
from negengine.bench.compare import FASTER, SLOWER, Comparison, OtherMachine
from negengine.bench.look import seconds
from negengine.bench.results import read
from negengine.cli.errors import one_line_errors

COLOURS = {SLOWER: "red", FASTER: "green"}


@one_line_errors
def compare(
    old: Annotated[Path, typer.Argument(help="A result file, such as operator.json or model.json.")],
    new: Annotated[Path, typer.Argument(help="A later one of the same study, of the same machine.")],
    threshold: Annotated[float, typer.Option(help="By which share a median must have moved to count.")] = comparing.THRESHOLD,
    ratios: Annotated[
        bool, typer.Option("--ratios", help="Compare each row's ratio to its case's base (release, without) instead of seconds.")
    ] = False,
    role: Annotated[str | None, typer.Option(help="Compare the rows of one role only, such as ours.")] = None,
    same_machine_only: Annotated[
        bool, typer.Option("--same-machine-only", help="Files of different machines are no error: say so and exit with 0.")
    ] = False,
) -> None:
    """What became slower or faster between two result files. Exits with 1 on a slowdown, with 2 if they cannot be compared.

    A row is slower if its median rose by more than the threshold and the spreads, 10th to 90th percentile, do not overlap.
    """
    documents = read(old), read(new)
    try:
        found = comparing.compare(*documents, threshold, ratios, role)
    except OtherMachine as reason:
        if not same_machine_only:
            raise
        typer.echo(f"not compared: {reason}")
        return
    show(found, shown_ratio if ratios else seconds)
    if found.count(SLOWER):
        raise typer.Exit(1)


def shown_ratio(value: float) -> str:
    return f"{value:.3f}"


def show(found: Comparison, text: Callable[[float], str]) -> None:
    """A table a case, then what no table holds."""
    console, widest = Console(), max(len(change.variant) for change in found.changes)
    for case in dict.fromkeys(change.case for change in found.changes):
        figures = (Column(name, justify="right", min_width=8) for name in ("old", "new", "change"))
        table = Table(
            Column("variant", min_width=widest), *figures, "verdict", title=escape(case), box=SIMPLE, title_justify="left"
        )
        for change in found.changes:
            if change.case == case:
                medians = text(change.old.median), text(change.new.median)
                cells = escape(change.variant), *medians, f"{change.relative:+.1%}", change.verdict
                table.add_row(*cells, style=COLOURS.get(change.verdict))
        console.print(table)
    for what, keys in (
        ("only in the old file", found.only_old),
        ("only in the new file", found.only_new),
        ("no base in its case, in one of the files", found.without_base),
    ):
        for case in dict.fromkeys(case for case, _ in keys):
            typer.echo(f"{what}: {case}: {', '.join(variant for other, variant in keys if other == case)}")
    for difference in found.differences:
        typer.echo(f"differs: {difference}")
    slower, faster = found.count(SLOWER), found.count(FASTER)
    typer.echo(f"{slower} slower, {faster} faster, {len(found.changes) - slower - faster} the same")
