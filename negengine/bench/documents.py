"""Reading result files, checked before anything is shown of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from negengine.bench import results

Row = Mapping[str, Any]
KINDS = ("model", "operator")


@dataclass(frozen=True)
class Source:
    """A result file.

    Attributes:
        what: ``model`` or ``operator``.
    """

    name: str
    what: str
    document: Mapping[str, Any]

    @property
    def rows(self) -> list[Row]:
        return self.document["rows"]

    def cases(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row["case"], []).append(row)
        return found


def base(row: Row, rows: Sequence[Row]) -> Row:
    """What a row is compared with: the same case, compiled as it is and with its attention, without a method."""
    for one in rows:
        if one["role"] == "without" and all(one[key] == row[key] for key in ("compiled", "attention")):
            return one
    raise ValueError(f"case {row['case']!r} lacks a row without a method to compare {row['variant']!r} with")


def noise(row: Row) -> float:
    """By which share the base differs from itself: of the spread of the ratios, round by round, the end that is further from 0.

    Older files have the median of the ratios alone.
    """
    return max(abs(row.get(key, row["noise"])) for key in ("noise", "noise_p10", "noise_p90"))


def read(path: Path) -> Source:
    """A result file that can be shown.

    Raises:
        OSError, ImportError, ValueError: as :func:`negengine.bench.results.read`.
        ValueError: as :func:`shown`.
    """
    return shown(str(path), results.read(path))


def shown(name: str, document: Mapping[str, Any]) -> Source:
    """A document that has the schema, checked for what a schema cannot say.

    Raises:
        ValueError: it is of another study, or holds no rows, or rows that do not belong together.
    """
    what = document["what"]
    if what not in KINDS:
        raise ValueError(f"{name} holds results of {what!r}; a report shows those of {' and '.join(KINDS)}")
    if not document["rows"]:
        raise ValueError(f"{name} has no rows: nothing was measured, or the run was stopped before its first case ended")
    source = Source(name, what, document)
    try:
        for case, rows in source.cases().items():
            _check_case(case, rows)
            for row in rows if what == "model" else ():
                base(row, rows)
                _check_steps(row)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return source


def _check_case(case: str, rows: Sequence[Row]) -> None:
    names = [row["variant"] for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"case {case!r} has more than one row of variant {name!r}")


def _check_steps(row: Row) -> None:
    for name, values in (("active", row["active"]), *(("a round of step_seconds", seconds) for seconds in row["step_seconds"])):
        if len(values) != row["steps"]:
            where = f"{row['case']}, {row['variant']}"
            raise ValueError(f"{where}: {name} must have an entry for each of {row['steps']} steps, not {values!r}")


def read_all(paths: Sequence[Path]) -> list[Source]:
    """As :func:`read`; the sources are named without their folders, unless two files have one name.

    Raises:
        ValueError: a file is named twice.
    """
    for number, path in enumerate(paths):
        if path.resolve() in [earlier.resolve() for earlier in paths[:number]]:
            raise ValueError(f"{path} is named twice; name every file once")
    sources = [read(path) for path in paths]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        return sources
    return [dataclasses.replace(source, name=name) for source, name in zip(sources, names, strict=True)]
