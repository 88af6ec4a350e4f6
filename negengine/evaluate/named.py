"""Files that say something of images or groups by their names: a CSV with two columns, or a JSON object."""

from __future__ import annotations

import csv
from pathlib import Path

from negengine.evaluate.files import read_json, read_text
from negengine.evaluate.groups import Drawn


def read_named(path: Path, what: str) -> dict[str, str]:
    """Name -> text.

    Args:
        path: a ``.csv`` file with a header and two columns, or a ``.json`` file with an object.
        what: the text is, for errors.

    Raises:
        ValueError: another ending, a file that does not parse, a row of another length, or a name twice.
        OSError: it cannot be read.
    """
    if path.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"{path} must be a .csv or a .json file of names and their {what}")
    if path.suffix.lower() == ".json":
        return _of_json(path, what)
    rows = [[cell.strip() for cell in row] for row in csv.reader(read_text(path).splitlines()) if row][1:]
    wrong = next((row for row in rows if len(row) != 2), None)
    if wrong is not None:
        raise ValueError(f"{path}: every row must be a name and its {what}, got {','.join(wrong)!r}")
    found: dict[str, str] = {}
    for name, value in rows:
        if name in found:
            raise ValueError(f"{path} has {name} twice")
        found[name] = value
    if not found:
        raise ValueError(f"{path} has no row below its header")
    return found


def _of_json(path: Path, what: str) -> dict[str, str]:
    found = read_json(path)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()) or not found:
        raise ValueError(f"{path} must hold an object of names and their {what}")
    return found


def for_images(path: Path, told: dict[str, str], drawn: Drawn, what: str) -> list[str]:
    """What a file says of every image of a variant: by the image's name or the key of its group, or either as ``VARIANT/name``.

    Raises:
        ValueError: an image that it says nothing of; says which, and how many.
    """
    found, missing = [], []
    for group in drawn.groups:
        for name in group.names:
            keys = (f"{drawn.name}/{name}", name, f"{drawn.name}/{group.key}", group.key)
            value = next((told[key] for key in keys if key in told), None)
            if value is None:
                missing.append(name)
            else:
                found.append(value)
    if missing:
        raise ValueError(
            f"{path} has no {what} for {missing[0]} of {drawn.name}"
            + (f", nor for {len(missing) - 1} other images" if len(missing) > 1 else "")
            + f"; it names {', '.join(list(told)[:3])}{', …' if len(told) > 3 else ''}"
        )
    return found


def check_used(path: Path, told: dict[str, str], drawn: list[Drawn], what: str) -> None:
    """Raises ValueError for names in a file that stand for no image and no group: it was made for other folders."""
    known = {key for variant in drawn for key in _keys(variant)}
    known |= {f"{variant.name}/{key}" for variant in drawn for key in _keys(variant)}
    strange = [name for name in told if name not in known]
    if strange:
        more = f" and {len(strange) - 1} others" if len(strange) > 1 else ""
        raise ValueError(
            f"{path} has a {what} for {strange[0]}{more}, which is neither an image nor a group; there is {sorted(known)[0]}"
        )


def check_single(path: Path, told: dict[str, str], drawn: list[Drawn], what: str) -> None:
    """Raises ValueError for a name of a file that stands for different pictures, of which each has a ``what`` of its own."""
    for name in told:
        holders = [variant.name for variant in drawn if name in _keys(variant)]
        if len(holders) > 1:
            raise ValueError(
                f"{path} has one {what} for {name}, which {' and '.join(holders)} hold; "
                f"write {holders[0]}/{name}, and a row for each folder"
            )


def _keys(variant: Drawn) -> set[str]:
    """The names of its groups and images."""
    return {key for group in variant.groups for key in (group.key, *group.names)}
