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
SCHEMA_FILE = Path(__file__).with_name("schema.json")


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

    Raises:
        ValueError: the file that is there is not JSON, or of another study or schema.
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
            self.document = _earlier(path, self.document)

    def add(
        self,
        rows: Sequence[Any],
        check: Mapping[str, Any] | None = None,
        left_out: Mapping[str, str] | None = None,
        turns: Sequence[str] = (),
    ) -> None:
        """Rows are dataclasses or mappings; ``check`` is the machine before and after; ``left_out`` name -> reason.

        Args:
            turns: the keys in which rows agree that were timed in turn. With them, what was measured anew replaces what the file
                has: rows that agree in these keys with new ones, rows that were now left out, and reasons to leave out what now has
                a row.
        """
        new = [dict(row) if isinstance(row, Mapping) else asdict(row) for row in rows]
        if turns:
            again = {tuple(row[key] for key in turns) for row in new}
            self.document["rows"] = [
                row
                for row in self.document["rows"]
                if tuple(row[key] for key in turns) not in again and _name(row) not in (left_out or {})
            ]
            self.document["left_out"] = {
                name: why for name, why in self.document["left_out"].items() if name not in map(_name, new)
            }
        self.document["rows"] += new
        self.document["left_out"] |= left_out or {}
        if check is not None:
            self.document["checks"].append(dict(check))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.document, indent=1) + "\n")
        part.replace(self.path)


def _name(row: Mapping[str, Any]) -> str:
    """As what was left out is named."""
    return f"{row['case']}: {row['variant']}"


def _earlier(path: Path, here: Mapping[str, Any]) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}, to which results would be added, is not JSON: {error}; name another folder") from error
    for key in ("schema", "what"):
        found = document.get(key) if isinstance(document, dict) else None
        if found != here[key]:
            raise ValueError(f"{path} has {key} {found!r}, and results of {key} {here[key]!r} cannot be added; name another folder")
    return document | {"date": here["date"]}


def read(path: Path) -> dict[str, Any]:
    """A result file, checked against ``schema.json``.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not JSON, has another schema, or a key that is missing or wrong. The message says which.
        ImportError: jsonschema is not installed.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise ValueError(f"{path} is no result file: it has no key 'schema' at its top")
    if document["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {document['schema']!r}; this version of negengine reads schema {SCHEMA}: measure anew")
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise ImportError("reading result files needs the package jsonschema: pip install 'negengine[bench]'") from error
    wrong = next(Draft202012Validator(json.loads(SCHEMA_FILE.read_text())).iter_errors(document), None)
    if wrong is not None:
        raise ValueError(f"{path}: {_place(document, list(wrong.absolute_path))}{_short(wrong.message)}")
    return document


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _place(document: Mapping[str, Any], path: Sequence[str | int]) -> str:
    """Where a value stands: its keys, and case and variant of its row."""
    keys = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")
    row = document["rows"][path[1]] if path[:1] == ["rows"] and len(path) > 1 else None
    named = [str(row[key]) for key in ("case", "variant") if key in row] if isinstance(row, dict) else []
    return " ".join([keys, f"({', '.join(named)})"] if named else [keys]) + ": " if path else ""


def _short(message: str) -> str:
    """Of a message that quotes a whole row, both ends."""
    return message if len(message) <= 160 else f"{message[:80]} … {message[-80:]}"


def omissions(left_out: Mapping[str, str]) -> str:
    """What was left out as text, a block a reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in left_out.items():
        reasons.setdefault(why, []).append(name)
    return "\n".join(f"{'; '.join(names)}\n    {why}" for why, names in reasons.items())


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
