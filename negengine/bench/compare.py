"""Two result files of one study: which rows became slower, and which faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from negengine.interleave import Timing

Document = Mapping[str, Any]
Row = Mapping[str, Any]
Key = tuple[str, str]  # case and variant

SLOWER, FASTER = "slower", "faster"
SAME, WITHIN = "same", "same within the spread"
TIMED = ("case", "variant", "median", "p10", "p90")
THRESHOLD = 0.05


class OtherMachine(ValueError):
    """The files were not measured on the same kind of machine."""


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of seconds, or of a ratio.

    Raises:
        ValueError: these are not positive, finite and in order.
    """

    median: float
    p10: float
    p90: float

    def __post_init__(self) -> None:
        if not 0 < self.p10 <= self.median <= self.p90 < math.inf:
            raise ValueError(f"p10, median and p90 must be positive and in order, got {self.p10}, {self.median}, {self.p90}")


@dataclass(frozen=True)
class Base:
    """To what the rows of a study stand in ratio: the row that has ``value`` at ``key``, of those that agree in ``same``."""

    same: tuple[str, ...]
    key: str
    value: str

    def group(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in self.same)


BASES = {"operator": Base(("case",), "variant", "release"), "model": Base(("case", "compiled", "attention"), "role", "without")}


@dataclass(frozen=True)
class Change:
    """A row that both files have."""

    case: str
    variant: str
    old: Spread
    new: Spread
    verdict: str

    @property
    def relative(self) -> float:
        return self.new.median / self.old.median - 1


@dataclass(frozen=True)
class Comparison:
    """Of two files.

    Attributes:
        only_old, only_new: rows of one file.
        without_base: rows that have no ratio, as their case has no base in at least one file.
        differences: what else differs and was not refused: dates and versions.
    """

    changes: list[Change]
    only_old: list[Key]
    only_new: list[Key]
    without_base: list[Key]
    differences: list[str]

    def count(self, verdict: str) -> int:
        return sum(change.verdict == verdict for change in self.changes)


def verdict(old: Spread, new: Spread, threshold: float) -> str:
    """Slower or faster only if the medians differ by more than the threshold and the spreads, p10 to p90, do not overlap."""
    relative = new.median / old.median - 1
    if abs(relative) <= threshold:
        return SAME
    if relative > 0:
        return SLOWER if new.p10 > old.p90 else WITHIN
    return FASTER if new.p90 < old.p10 else WITHIN


def compare(
    old: Document, new: Document, threshold: float = THRESHOLD, ratios: bool = False, role: str | None = None
) -> Comparison:
    """Join the rows of two documents, as :func:`negengine.bench.results.read` gives them, by case and variant.

    Args:
        threshold: a share; a median that moved by no more is the same.
        ratios: compare what each row takes relative to the base of its case instead of seconds.
        role: compare the rows that have this role only.

    Raises:
        OtherMachine: the processor, the GPUs, the threads or a CPU's instruction set differ.
        ValueError: the files cannot be compared for another reason.
    """
    if not 0 <= threshold < math.inf:
        raise ValueError(f"the threshold is a share of at least 0, such as 0.05; got {threshold}")
    _check_study(old, new, ratios)
    check_machine(old, new)
    spreads = ratio_spreads if ratios else second_spreads
    before, after = (_of_role(spreads(document), document, role) for document in (old, new))
    without_base = [key for key in {**before, **after} if any(side.get(key, ()) is None for side in (before, after))]
    changes = []
    for key, spread in before.items():
        if spread is not None and (now := after.get(key)) is not None:
            changes.append(Change(*key, spread, now, verdict(spread, now, threshold)))
    if not changes:
        rows = f"rows of role {role!r}" if role else "rows"
        baseless = f", and {len(without_base)} have no base in their case" if without_base else ""
        raise ValueError(
            f"the files have no row in common: of {len(before)} and {len(after)} {rows} none agree in case and variant{baseless}"
        )
    only_old, only_new = [key for key in before if key not in after], [key for key in after if key not in before]
    return Comparison(changes, only_old, only_new, without_base, differences(old, new))


def second_spreads(document: Document) -> dict[Key, Spread | None]:
    """Of each row."""
    return {key: _spread(key, row["median"], row["p10"], row["p90"]) for key, row in _rows(document).items()}


def ratio_spreads(document: Document) -> dict[Key, Spread | None]:
    """Of each row that is no base itself, over its base; None where it has none."""
    base = BASES[document["what"]]
    rows = _rows(document)
    bases = _unique((row for row in rows.values() if row[base.key] == base.value), base.group, base.same)
    found = {key: (row, bases.get(base.group(row))) for key, row in rows.items() if row[base.key] != base.value}
    return {key: None if other is None else _ratio(key, row, other) for key, (row, other) in found.items()}


def differences(old: Document, new: Document) -> list[str]:
    """What two documents differ in that forbids no comparison."""
    named = [{"date": document["date"], "instruction set": document["isa"], **document["versions"]} for document in (old, new)]
    return _differing(*named)


def apart(old: Document, new: Document) -> list[str]:
    """What two documents differ in of machine, instruction set and versions, by name."""
    named = [{**_machine(one), "instruction set": one["isa"], **one["versions"]} for one in (old, new)]
    return _differing(*named)


def check_machine(old: Document, new: Document) -> None:
    """Raises OtherMachine where :func:`compare` does."""
    differing = _differing(*(_machine(document) for document in (old, new)))
    if not (differing or old["machine"]["gpus"]):  # virtual processors of one name can differ in this, and ours uses all there is
        differing = _differing({"instruction set": old["isa"]}, {"instruction set": new["isa"]})
    if differing:
        raise OtherMachine(f"the files were measured on different machines: {'; '.join(differing)}")


def _check_study(old: Document, new: Document, ratios: bool) -> None:
    if old["what"] != new["what"]:
        raise ValueError(f"the files are of different studies: {old['what']!r} and {new['what']!r}")
    if ratios and old["what"] not in BASES:
        raise ValueError(f"there are ratios of {' and '.join(BASES)}, not of {old['what']!r}: compare its seconds")


def _machine(document: Document) -> dict[str, Any]:
    machine = document["machine"]
    return {"processor": machine["processor"], "GPUs": ", ".join(machine["gpus"]), "threads": machine["threads"]}


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} {old.get(name) or 'none'} and {new.get(name) or 'none'}" for name in names]


def _of_role(spreads: dict[Key, Spread | None], document: Document, role: str | None) -> dict[Key, Spread | None]:
    rows = _rows(document)
    return {key: spread for key, spread in spreads.items() if role is None or rows[key].get("role") == role}


def _rows(document: Document) -> dict[Key, Row]:
    for number, row in enumerate(document["rows"]):
        missing = [key for key in TIMED if key not in row]
        if missing:
            raise ValueError(f"the rows of {document['what']!r} cannot be compared: rows[{number}] has no {', '.join(missing)}")
    return _unique(document["rows"], lambda row: (row["case"], row["variant"]), ("case", "variant"))


def _unique(rows: Iterable[Row], key: Callable[[Row], Any], names: tuple[str, ...]) -> dict[Any, Row]:
    found: dict[Any, Row] = {}
    for row in rows:
        if found.setdefault(key(row), row) is not row:
            raise ValueError(f"two rows have the same {', '.join(names)}: {', '.join(map(str, key(row)))}")
    return found


def _ratio(key: Key, row: Row, base: Row) -> Spread:
    """Round by round where the rounds were kept; else the widest that both spreads allow."""
    if "step_seconds" not in row:
        return _spread(key, row["median"] / base["median"], row["p10"] / base["p90"], row["p90"] / base["p10"])
    loops, others = ([math.fsum(steps) for steps in one["step_seconds"]] for one in (row, base))
    if len(loops) != len(others):
        raise ValueError(f"{', '.join(key)} has {len(loops)} rounds, and its base {base['variant']} has {len(others)}")
    timing = Timing(tuple(loop / other for loop, other in zip(loops, others, strict=True)))
    return _spread(key, timing.median, timing.percentile(10), timing.percentile(90))


def _spread(key: Key, median: float, p10: float, p90: float) -> Spread:
    try:
        return Spread(median, p10, p90)
    except ValueError as error:
        raise ValueError(f"{', '.join(key)}: {error}") from error
