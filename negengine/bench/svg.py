"""Plots as inline SVG. Colours come from the page's classes, so that one drawing serves light, dark and print; all text is escaped.

A drawing does not shrink its text: it is made once for wide pages and once for narrow ones.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDE, NARROW = 900, 340
EM, SMALL, LINE = 15, 13, 20  # sizes of text and the distance of its lines, as the page's style sets them
LETTER, BOLD = 0.62, 0.72  # mean width of a letter of the widest common font, in its size
BAR, GAP = 22, 18
ACTIVE = "active"

Ticks = Callable[[Sequence[float]], list[str]]  # the marks of an axis -> what is written at them


@dataclass(frozen=True)
class Bar:
    """A value with what is written at it.

    Attributes:
        tone: class of its colour: ``ours``, ``published``, ``without``, ``reported`` or ``other``.
        low, high: ends of its spread; None: it has none.
        mark: a value of another origin on the same scale, drawn as a stroke.
        hollow: only outlined, for what was not measured.
    """

    label: str
    note: str
    value: float
    text: str
    tone: str
    low: float | None = None
    high: float | None = None
    mark: float | None = None
    hollow: bool = False

    @property
    def ends(self) -> list[float]:
        return [end for end in (0.0, self.value, self.low, self.high, self.mark) if end is not None]


@dataclass(frozen=True)
class Series:
    """Points of a line: place, value, ends of its spread."""

    label: str
    tone: str
    points: Sequence[tuple[float, float, float, float]]


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element; ``class_`` is ``class``, and an underscore in a name is a hyphen."""
    told = Markup().join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), round(value, 1) if isinstance(value, float) else value)
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), told, Markup().join(escape(child) for child in children))


def picture(title: str, width: float, height: float, parts: Sequence[Markup]) -> Markup:
    """The whole drawing, which screen readers announce by its title."""
    box = f"0 0 {width:.0f} {height:.0f}"
    return tag("svg", *parts, viewBox=box, role="img", aria_label=title, style=f"max-width: {1.25 * width:.0f}px")


def bars(title: str, rows: Sequence[Bar], width: float, band: tuple[float, float] | None = None) -> Markup:
    """Horizontal bars from zero, each with its label, value and spread; ``band`` is shaded behind all of them."""
    stacked = width < 500
    longest = max(max(_width(row.label), _width(row.note, SMALL)) for row in rows)
    column = width if stacked else min(longest, 0.42 * width)
    left = 0.0 if stacked else column + 18
    labels = [_label(row, column) for row in rows]
    low = min(end for row in rows for end in (*row.ends, *(band or ())))
    room = [(row, _width(row.text, BOLD / LETTER * EM) + 12) for row in rows]
    before = left + max((wide for row, wide in room if row.value < 0), default=0.0)  # their values stand at the left
    end = width - 2
    scale = min((end - before - (wide if row.value >= 0 else 0.0)) / max(max(row.ends) - low, 1e-30) for row, wide in room)
    if band:
        scale = min(scale, (end - before) / (band[1] - low) if band[1] > low else scale)

    def x(value: float) -> float:
        return before + (value - low) * scale

    parts: list[Markup] = []
    top = 4.0
    for row, lines in zip(rows, labels, strict=True):
        text = LINE * len(lines)
        middle = top + text + 10 + BAR / 2 if stacked else top + max(text, BAR) / 2
        start = top if stacked else middle - text / 2
        parts += [
            tag("text", line, x=0 if stacked else left - 18, y=start + LINE * place + 15, class_=kind + ("" if stacked else " end"))
            for place, (line, kind) in enumerate(lines)
        ]
        if stacked:  # each bar has its own zero, since the labels lie between them
            ends = middle - BAR / 2 - 5, middle + BAR / 2 + 5
            parts += [_shade(band, *ends, x)] if band else []
            parts.append(tag("line", x1=x(0), x2=x(0), y1=ends[0], y2=ends[1], class_="axis"))
        parts += _bar(row, middle, x)
        top = middle + max(BAR, 0 if stacked else text) / 2 + GAP
    height = top - GAP + 4
    if stacked:
        return picture(title, width, height, parts)
    behind = [_shade(band, 0, height, x)] if band else []
    return picture(title, width, height, [*behind, tag("line", x1=x(0), x2=x(0), y1=0, y2=height, class_="axis"), *parts])


def _shade(band: tuple[float, float], top: float, bottom: float, x: Callable[[float], float]) -> Markup:
    return tag("rect", x=x(band[0]), y=top, width=x(band[1]) - x(band[0]), height=bottom - top, class_="band")


def _label(row: Bar, column: float) -> list[tuple[str, str]]:
    """Lines and their classes."""
    label = textwrap.wrap(row.label, max(8, int(column / (LETTER * EM))))
    note = textwrap.wrap(row.note, max(8, int(column / (LETTER * SMALL))))
    return [(line, "label") for line in label] + [(line, "note") for line in note]


def _bar(row: Bar, middle: float, x: Callable[[float], float]) -> list[Markup]:
    start, stop = sorted((x(0), x(row.value)))
    kind = f"bar {row.tone}" + (" hollow" if row.hollow else "")
    parts = [tag("rect", x=start, y=middle - BAR / 2, width=max(stop - start, 1.5), height=BAR, rx=3, class_=kind)]
    if row.mark is not None:
        parts.append(tag("line", x1=x(row.mark), x2=x(row.mark), y1=middle - BAR / 2 - 4, y2=middle + BAR / 2 + 4, class_="mark"))
    if row.low is not None and row.high is not None:
        reach = [(row.low, row.high, 0.0, 0.0), (row.low, row.low, -5.0, 5.0), (row.high, row.high, -5.0, 5.0)]
        parts += [
            tag("line", x1=x(first), x2=x(last), y1=middle + up, y2=middle + down, class_=kind)
            for kind in ("halo", "spread")
            for first, last, up, down in reach
        ]
    side = -1 if row.value < 0 else 1
    at = max((x(end) for end in row.ends), key=lambda place: side * place)
    return [*parts, tag("text", row.text, x=at + 10 * side, y=middle + 5, class_="value" + (" end" if side < 0 else ""))]


def steps(title: str, series: Sequence[Series], active: Sequence[bool], width: float, text: Ticks) -> Markup:
    """A mark for each step and series; the steps in which the method acts are shaded. The values do not begin at zero."""
    frame = _Frame.around(series, width, text, top=30, zero=False)
    slot = (frame.right - frame.left) / len(active)

    def x(step: float) -> float:
        return frame.left + (step - 0.5) * slot

    parts = []
    for first, last in _runs(active):
        start = x(first - 0.5)
        wide = (last - first + 1) * slot
        parts.append(tag("rect", x=start, y=frame.top - 24, width=wide, height=frame.bottom - frame.top + 24, class_="active"))
        if wide > _width(ACTIVE, SMALL):
            parts.append(tag("text", ACTIVE, x=start + wide / 2, y=frame.top - 8, class_="tick middle"))
    parts += frame.grid()
    every = math.ceil(1.2 * _width(str(len(active)), SMALL) / slot)
    for step in range(1, len(active) + 1):
        if (step - 1) % every == 0:
            parts.append(tag("text", step, x=x(step), y=frame.bottom + 20, class_="tick middle"))
    parts.append(tag("text", "step", x=(frame.left + frame.right) / 2, y=frame.bottom + 42, class_="tick middle"))
    dodge = min(8.0, slot / (len(series) + 1))
    shift = {one.label: (place - (len(series) - 1) / 2) * dodge for place, one in enumerate(series)}
    parts += frame.lines(series, lambda one, place: x(place) + shift[one.label])
    return picture(title, width, frame.bottom + 50, [*parts, *frame.names(series, x(len(active)) + max(shift.values()))])


def lines(
    title: str,
    series: Sequence[Series],
    under: str,
    width: float,
    text: Ticks,
    value_text: Callable[[float], str],
) -> Markup:
    """Lines over a size, whose axis is logarithmic; the values begin at zero and are written at their points."""
    frame = _Frame.around(series, width, text, top=24, zero=True)
    places = sorted({point[0] for one in series for point in one.points})
    inset = 36
    span = math.log(places[-1] / places[0])

    def x(place: float) -> float:
        return frame.left + inset + (frame.right - frame.left - 2 * inset) * math.log(place / places[0]) / span

    parts = frame.grid()
    parts += [tag("text", f"{place:g}", x=x(place), y=frame.bottom + 20, class_="tick middle") for place in places]
    parts.append(tag("text", under, x=(frame.left + frame.right) / 2, y=frame.bottom + 42, class_="tick middle"))
    parts += frame.lines(series, lambda _, place: x(place))
    for one in series:
        for place, value, *_ in one.points:
            height = frame.y(value)
            others = [frame.y(point[1]) for other in series if other is not one for point in other.points if point[0] == place]
            below = any(0 <= height - other < 2 * LINE for other in others)
            parts.append(tag("text", value_text(value), x=x(place), y=height + (22 if below else -12), class_=f"point {one.tone}"))
    return picture(title, width, frame.bottom + 50, [*parts, *frame.names(series, x(places[-1]))])


@dataclass(frozen=True)
class _Frame:
    """Where a plot with a vertical axis lies, in the drawing and in its values."""

    left: float
    right: float
    top: float
    bottom: float
    low: float
    high: float
    ticks: Sequence[float]
    texts: Sequence[str]
    narrow: bool

    @classmethod
    def around(cls, series: Sequence[Series], width: float, text: Ticks, top: float, zero: bool) -> _Frame:
        ends = [end for one in series for point in one.points for end in point[1:]]
        low, high = min(ends), max(ends)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        ticks = nice(low, high)
        narrow = width < 500
        texts = text(ticks)
        left = 12 + max(_width(written, SMALL) for written in texts)
        right = width - (8 if narrow else 18 + max(_width(one.label) for one in series))
        key = LINE * len(series) + 8 if narrow else 0  # a line of text for each name, where there is no room beside the plot
        return cls(left, right, top + key, top + key + (230 if narrow else 270), ticks[0], ticks[-1], ticks, texts, narrow)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top)

    def grid(self) -> list[Markup]:
        return [
            part
            for tick, written in zip(self.ticks, self.texts, strict=True)
            for part in (
                tag("line", x1=self.left, x2=self.right, y1=self.y(tick), y2=self.y(tick), class_="axis" if tick == 0 else "grid"),
                tag("text", written, x=self.left - 8, y=self.y(tick) + 4, class_="tick end"),
            )
        ]

    def lines(self, series: Sequence[Series], x: Callable[[Series, float], float]) -> list[Markup]:
        parts = []
        for one in series:
            way = " ".join(f"{x(one, point[0]):.1f},{self.y(point[1]):.1f}" for point in one.points)
            parts.append(tag("polyline", points=way, class_=f"line {one.tone}"))
            for place, value, low, high in one.points:
                at = x(one, place)
                if high > low:
                    parts.append(tag("line", x1=at, x2=at, y1=self.y(low), y2=self.y(high), class_=f"line {one.tone}"))
                parts.append(dot(one.tone, at, self.y(value)))
        return parts

    def names(self, series: Sequence[Series], end: float) -> list[Markup]:
        """Beside the last points; above the plot where it is narrow."""
        if self.narrow:
            heights = [12.0 + LINE * place for place in range(len(series))]
            marks = [dot(one.tone, 8.0, height) for one, height in zip(series, heights, strict=True)]
            return marks + [
                tag("text", one.label, x=20, y=height + 5, class_="label") for one, height in zip(series, heights, strict=True)
            ]
        heights = apart([self.y(one.points[-1][1]) for one in series], self.top, self.bottom)
        return [
            tag("text", one.label, x=max(end + 12, self.right - 8), y=height + 5, class_=f"label {one.tone}")
            for one, height in zip(series, heights, strict=True)
        ]


def dot(tone: str, x: float, y: float) -> Markup:
    """Each colour has a shape of its own."""
    if tone == "ours":
        return tag("circle", cx=x, cy=y, r=4.5, class_=f"dot {tone}")
    if tone == "published":
        return tag("rect", x=x - 4, y=y - 4, width=8, height=8, class_=f"dot {tone}")
    corners = ((0, -5), (5, 4), (-5, 4)) if tone == "other" else ((0, -5), (5, 0), (0, 5), (-5, 0))
    return tag("polygon", points=" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners), class_=f"dot {tone}")


def nice(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that enclose a range."""
    span = (high - low) or abs(high) * 0.1 or 1.0
    unit = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, max(last, first + 1) + 1)]


def apart(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """The same heights in the same order, moved until lines of text do not touch."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    moved = list(heights)
    for above, below in itertools.pairwise(order):
        moved[below] = max(moved[below], moved[above] + LINE)
    excess = max(0.0, moved[order[-1]] - bottom)
    moved[order[-1]] -= excess
    for below, above in itertools.pairwise(reversed(order)):
        moved[above] = min(moved[above], moved[below] - LINE)
    return [max(height, top) if len(heights) == 1 else height for height in moved]


def _runs(active: Sequence[bool]) -> list[tuple[int, int]]:
    """First and last step, counted from 1, of each stretch of active ones."""
    found = []
    for acts, group in itertools.groupby(enumerate(active, 1), key=lambda item: item[1]):
        numbers = [number for number, _ in group]
        if acts:
            found.append((numbers[0], numbers[-1]))
    return found


def _width(text: str, size: float = EM) -> float:
    return LETTER * size * len(text)
