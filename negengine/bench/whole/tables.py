"""The rows as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from negengine.bench.documents import noise
from negengine.bench.look import percent, precise


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text, a block per case."""
    return "\n".join(line for case in dict.fromkeys(row["case"] for row in rows) for line in _block(case, rows))


def _block(case: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Columns in which nothing is known are left out."""
    mine = [row for row in rows if row["case"] == case]
    lines = [("", "loop", "added", "active step", "merged", "whole model", "added to it"), *map(_cells, mine)]
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    yield case
    for name, *figures in zip(*columns, strict=True):
        told = [f"  {text:>{width}}" for text, width in zip(figures, widths[1:], strict=True)]
        yield f"  {name:{widths[0]}}{''.join(told)}".rstrip()
    yield f"  noise {percent(max(map(noise, mine)), '')}: so much the loop without a method differs, timed again"
    if any(row["full"] for row in mine):
        yield "  whole model: computed from these blocks, not measured"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    acts, full, share = row["role"] != "without", row["full"], row["merged_share"]
    return (
        row["variant"],
        precise(row["median"]),
        percent(row["overhead"]) if acts else "",
        "" if row["overhead_active_step"] is None else percent(row["overhead_active_step"]),
        "" if share is None else percent(share, ""),
        precise(full["loop"]) if full else "",
        percent(full["overhead"]) if full and acts else "",
    )
