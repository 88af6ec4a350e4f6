"""Results as JSON: one file a study, one flat row a variant and case."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from negengine.environment import machine, versions

SCHEMA = 1


def device_name(device: str) -> str:
    """For a folder: ``cpu``, or the GPU's name."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-").replace("nvidia-", "")


def instruction_set() -> str | None:
    from negengine.kernels.cpu import library

    return library.isa() if library.missing() is None else None


class Results:
    """A file that is written whole after each case, so that a run that is stopped leaves what it has.

    Args:
        proceed: add to the file if it is there already, as several processes of one run do one after another.
    """

    def __init__(self, path: Path, what: str, proceed: bool = False) -> None:
        self.path = path
        self.document: dict[str, Any] = {
            "schema": SCHEMA,
            "what": what,
            "date": time.strftime("%Y-%m-%d"),
            "isa": instruction_set(),
            "machine": machine(),
            "versions": versions(),
            "left_out": {},
            "checks": [],
            "rows": [],
        }
        if proceed and path.exists():
            self.document = json.loads(path.read_text())

    def add(self, rows: Sequence[Any], check: Mapping[str, Any] | None = None, left_out: Mapping[str, str] | None = None) -> None:
        """Rows are dataclasses or mappings; ``check`` is the machine before and after; ``left_out`` name -> reason."""
        self.document["rows"] += [dict(row) if isinstance(row, Mapping) else asdict(row) for row in rows]
        self.document["left_out"] |= left_out or {}
        if check is not None:
            self.document["checks"].append(dict(check))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.document, indent=1) + "\n")
        part.replace(self.path)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of operator results as text, a block a case."""
    lines: list[str] = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        share, noise = mine[0]["merged_share"], mine[0]["noise"]
        lines.append(f"{case}: {share:.0%} merged, noise {noise:.1%}, peak drift {mine[0]['peak_drift']:.1%}")
        if mine[0]["warning"]:
            lines.append(f"  WARNING: {mine[0]['warning']}")
        for row in mine:
            reached = f"{row['floor_reached']:5.0%}" if row["floor_reached"] is not None else "    -"
            extra = f"{row['extra_bytes'] / 1e6:8.1f} MB" if row["extra_bytes"] is not None else " " * 11
            ratios = ", ".join(f"{name} {value:.2f}" for name, value in row["ratio"].items())
            lines.append(
                f"  {row['variant']:18} {row['median'] * 1e3:9.3f} ms ({row['p10'] * 1e3:.3f} … {row['p90'] * 1e3:.3f})"
                f"  of floor {reached} {extra}  {ratios}"
            )
    return "\n".join(lines)
