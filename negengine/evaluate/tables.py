"""Results as cells of text, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from negengine.evaluate.published import BESIDE, Published

Document = Mapping[str, Any]
NO_WIDTH = 1e-9  # of an interval: but for rounding, all differences are equal
AGREEING = 6  # differences of one sign say something from here on: in a sign test their p is 2 ** -5, of five 2 ** -4
ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}


@dataclass(frozen=True)
class Table:
    """Cells of text. note: below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(told: Document) -> list[Table]:
    """The variants by the metrics; differences from the base; the pairs; what the paper prints."""
    base, *others = told["variants"]
    found = [_means(told)]
    if others:
        found.append(_differences(told, base, others))
    found += [_pair(table, base) for table in told["pairs"]]
    return found + [_published(one) for one in BESIDE.get(told["settings"].get("protocol", ""), ())]


def markdown(told: Document, command: str) -> str:
    """All tables as a page, with what is needed to repeat them."""
    settings = told["settings"]
    lines = [f"# Evaluation{': ' + settings['protocol'] if 'protocol' in settings else ''}", "", f"`{command}`", ""]
    lines += [f"{told['date']}, {told['machine']['processor']}, torch {told['versions']['torch']}", ""]
    for table in tables(told):
        lines += [f"## {table.title}", "", _line(table.columns), _line(["---", *["---:"] * (len(table.columns) - 1)])]
        lines += [_line(row) for row in table.rows]
        lines += ["", *([table.note, ""] if table.note else [])]
    lines += ["## What the metrics say", ""]
    lines += [
        f"- **{about['title']}** (`{key}`, by {about['library']}): {about['about']}." for key, about in told["metrics"].items()
    ]
    lines += ["", *(f"- {remark}" for remark in told["remarks"])]
    return "\n".join(lines).rstrip() + "\n"


def shown(about: Mapping[str, Any], value: float | None) -> str:
    """A value in the form of its metric."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if about["percent"] else f"{value:.3f}"


def _row(told: Document, variant: str, metric: str) -> Mapping[str, Any]:
    return next(row for row in told["rows"] if (row["variant"], row["metric"]) == (variant, metric))


def _means(told: Document) -> Table:
    variants = list(told["variants"])
    rows = []
    for key, about in told["metrics"].items():
        found = [_row(told, variant, key) for variant in variants]
        rows.append((_title(key, about), *(f"{shown(about, row['mean'])}{between(about, row)}" for row in found)))
    counts = [_counts(told["variants"][variant]) for variant in variants]
    alike = len(set(counts)) == 1
    heads = variants if alike else [f"{name} ({count})" for name, count in zip(variants, counts, strict=True)]
    level = f"in brackets the {told['interval']['level']:.0%} confidence interval of the mean{_over(told['rows'])}."
    note = f"{counts[0]} of each; {level}" if alike else f"{level[0].upper()}{level[1:]}"
    images = {told["variants"][variant]["images"] for variant in variants}
    sets = [about["title"] for about in told["metrics"].values() if about["unit"] == "set"]
    if len(images) > 1 and sets:
        note += f" {', '.join(sets)}: of sets, whose values depend on the number of images, which is unequal here."
    return _narrow(Table("Means", ("", *heads), tuple(rows), note))


def _counts(variant: Mapping[str, Any]) -> str:
    seeds = len(variant["seeds"])
    return f"{variant['images']} images in {variant['groups']} groups" + (f", {seeds} seed{'s' * (seeds > 1)}" if seeds else "")


def _over(found: Sequence[Mapping[str, Any]]) -> str:
    """What was resampled, as results since the key was added tell."""
    kinds = sorted({(str(one["over"]), int(one["units"])) for one in found if one.get("over") and one["units"]})
    words = [
        f"{number} {over if number > 1 else over[:-1]}" + (" (each the mean of its groups)" if over == "prompts" else "")
        for over, number in kinds
    ]
    return f", over {' or '.join(words)}" if words else ""


def _differences(told: Document, base: str, others: Sequence[str]) -> Table:
    rows = []
    for key, about in told["metrics"].items():
        cells = []
        for variant in others:
            difference = _row(told, variant, key)["difference"]
            if difference is None:
                cells.append("-")
                continue
            signed = f"{difference['mean'] * 100:+.1f} points" if about["percent"] else f"{difference['mean']:+.3f}"
            cells.append(f"{signed}{between(about, difference)}{_verdict(about, difference)}")
        rows.append((_title(key, about), *cells))
    found = [row["difference"] for row in told["rows"] if row["difference"] is not None]
    how = f"{_paired(told, found)}{_over(found)}"
    if any(one["low"] is not None and one["high"] - one["low"] < NO_WIDTH for one in found):
        how += f"; an interval of no width: all of them agree, which says something from {AGREEING} on"
    note = f"{how}; better or worse where the interval does not hold 0, with as many tests as there are cells."
    return _narrow(Table(f"Differences from {base}", ("", *others), tuple(rows), note))


def _paired(told: Document, found: Sequence[Mapping[str, Any]]) -> str:
    """How the differences were paired; where a variant has only some groups of the base, how many both have."""
    if not all(one["paired"] for one in found):
        return (
            "not paired where a variant shares fewer than two groups with the base"
            if any(one["paired"] for one in found)
            else "not paired, as the groups have other names"
        )
    groups = {about["groups"] for about in told["variants"].values()}
    shared = {one["pairs"] for one in found if one.get("over") in ("prompts", "groups")}
    some = shared and (len(groups) > 1 or shared != groups)
    return "paired by prompt and seed" + (f", by the {' or '.join(map(str, sorted(shared)))} groups that both have" if some else "")


def _narrow(table: Table) -> Table:
    """With variants as rows, where there are more of them than metrics."""
    if len(table.columns) - 1 <= len(table.rows):
        return table
    columns, *rows = zip(table.columns, *table.rows, strict=True)
    return Table(table.title, columns, tuple(rows), table.note)


def _pair(table: Mapping[str, Any], base: str) -> Table:
    rows = []
    for choice in table["choices"]:
        both = [choice[what] for what in ("correctness", "quality")]
        rows.append((choice["who"], *(f"{100 * one['mean']:.1f} %{between({'percent': True}, one)}" for one in both)))
    against = f"{base} and {table['opponent']}" if table["opponent"] else base
    over = _over([choice["correctness"] | {"over": table.get("over")} for choice in table["choices"]])
    note = f"{table['pictures']} pictures of each; intervals of shares averaged by group{over}."
    return Table(f"DNP against {against}", ("best picture", "correctness", "quality"), tuple(rows), note)


def _published(one: Published) -> Table:
    rows = tuple((who, *numbers) for who, numbers in one.rows.items())
    note = " ".join(text for text in (f"Read in: {one.source}.", one.remark) if text)
    return Table(f"Published: {one.title}", ("", *one.columns), rows, note)


def _title(key: str, about: Mapping[str, Any]) -> str:
    seer = f" ({about['extractor']})" if about["extractor"] else ""
    return f"{about['title']}{seer}{ARROWS[about['better']]}"


def between(about: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    if row["low"] is None:
        return ""
    scale, form = (100, ".1f") if about["percent"] else (1, ".3f")
    return f" [{row['low'] * scale:{form}}, {row['high'] * scale:{form}}]"


def _verdict(about: Mapping[str, Any], difference: Mapping[str, Any]) -> str:
    low, high = difference["low"], difference["high"]
    if low is None or about["better"] is None or low <= 0 <= high:
        return ""
    if high - low < NO_WIDTH and difference.get("units", 0) < AGREEING:
        return ""
    return " better" if (difference["low"] > 0) == (about["better"] == "higher") else " worse"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
