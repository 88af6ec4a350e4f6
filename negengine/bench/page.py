"""A report as plain data, and written as one HTML page or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from negengine.bench import look


@dataclass(frozen=True)
class Table:
    """Text alone.

    Attributes:
        texts: how many columns, from the left, hold words; the others hold numbers.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


@dataclass(frozen=True)
class Figure:
    """A drawing for wide and one for narrow pages, and what it shows."""

    title: str
    caption: str
    wide: Markup
    narrow: Markup


@dataclass(frozen=True)
class Section:
    """Notes stand above the figures, tables below them.

    Attributes:
        folded: the tables are only shown on demand.
    """

    title: str
    notes: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    folded: bool = False


@dataclass(frozen=True)
class Headline:
    """What is read first.

    Attributes:
        kind: how the number is known.
        table: the same as the figure, for Markdown.
    """

    number: str
    kind: str
    title: str
    notes: Sequence[str]
    figure: Figure
    table: Table


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    headline: Headline | None
    sections: Sequence[Section]


def html(page: Page) -> str:
    """One page that needs nothing but itself."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["paths"] = paths
    return environment.get_template("report.html.j2").render(page=page, look=look) + "\n"


def paths(text: str) -> Markup:
    """Text whose paths may be broken after a slash."""
    return Markup(re.sub(r"(?<=[\w.-])/(?=[\w.-])", "/<wbr>", str(escape(text))))


def markdown(page: Page) -> str:
    """The headline and every table."""
    parts = [f"# {_plain(page.title)}", _plain(page.subtitle)]
    if page.headline:
        parts += [
            f"**{_plain(page.headline.number)}** ({_plain(page.headline.kind)}) {_plain(page.headline.title)}.",
            *map(_plain, page.headline.notes),
        ]
        parts.append(_table(page.headline.table))
    for section in page.sections:
        parts += [f"## {_plain(section.title)}", *map(_plain, section.notes)]
        for table in section.tables:
            parts += [_plain(table.caption.rstrip(".")) + ":", _table(table)]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    marks = ["---" if place < table.texts else "---:" for place in range(len(table.head))]
    return "\n".join(f"| {' | '.join(map(_plain, cells))} |" for cells in (table.head, *table.rows)).replace(
        "\n", f"\n| {' | '.join(marks)} |\n", 1
    )


def _plain(text: str) -> str:
    """Text in which Markdown sees no marks, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(text.split()))
