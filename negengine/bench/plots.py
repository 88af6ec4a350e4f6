"""Results as pictures: time against floor, scaling, overhead end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from negengine.bench.look import GREY, GRID, OURS, STYLES, seconds, style

Document = Mapping[str, Any]

TOP, BOTTOM = 0.55, 0.55  # inches for the title and the labels


def caption(document: Document) -> str:
    machine, isa = document["machine"], document["isa"]
    where = machine["gpus"][0] if machine["gpus"] else f"{machine['processor']}, {machine['threads']} threads, {isa or 'PyTorch'}"
    return f"{where} · torch {document['versions']['torch']} · {document['date']}"


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _plain(ax: Axes) -> None:
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _time_axis(axis: Any, ticks: Sequence[float] | None = None) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value)))
    axis.set_minor_locator(NullLocator())
    if ticks is not None:
        axis.set_major_locator(FixedLocator(list(ticks)))


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade, or 1 alone where they would crowd."""
    decades = [10.0**e for e in range(-9, 4)]
    fine = [m * d for d in decades for m in (1, 2, 5) if low <= m * d <= high]
    return fine if len(fine) <= 6 else [d for d in decades if low <= d <= high]


def time_against_floor(document: Document, path: Path, matching: str = "paper", gate: str = "half") -> Path:
    """A panel a shape and dtype; a mark at each variant's median, a bar from 10th to 90th percentile, a grey tick at its floor."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in document["rows"] if row["matching"] == matching and row["gate"] == gate]
    shapes, dtypes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "dtype"))
    panels = {(s, d): [r for r in rows if r["shape"] == s and r["dtype"] == d] for s in shapes for d in dtypes}
    styles = style(list(dict.fromkeys(row["variant"] for row in rows)))
    heights = [max(len(panels[s, d]) for d in dtypes) for s in shapes]
    size = (1.2 + 4.6 * len(dtypes), TOP + BOTTOM + sum(0.23 * h + 0.65 for h in heights))
    figure, axes = plt.subplots(
        len(shapes),
        len(dtypes),
        figsize=size,
        squeeze=False,
        sharex="row",
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for i, shape in enumerate(shapes):
        for j, dtype in enumerate(dtypes):
            _floor_panel(axes[i][j], sorted(panels[shape, dtype], key=lambda row: row["median"]), styles)
        found = [row for dtype in dtypes for row in panels[shape, dtype]]
        low = 0.85 * min(row["floor"] or row["p10"] for row in found)
        high = 1.6 * max(row["p90"] for row in found)
        for ax in axes[i]:
            ax.set_xscale("log")
            ax.set_xlim(low, high)
            _time_axis(ax.xaxis, _ticks(low, high))
    for ax in axes[-1]:
        ax.set_xlabel("time of a whole call (log)")
    figure.suptitle(f"NegToMe, one call: time against floor ( | ), {matching} matching\n{caption(document)}", fontsize=10)
    saved = _save(figure, path)
    plt.close(figure)
    return saved


def _floor_panel(ax: Axes, rows: Sequence[Mapping[str, Any]], styles: Mapping[str, tuple[str, str]]) -> None:
    if not rows:
        ax.set_axis_off()
        return
    row = rows[0]
    _plain(ax)
    ax.set_title(f"{row['shape']}: {row['images']} × {row['tokens']} × {row['channels']}, {row['dtype']}", fontsize=9, loc="left")
    names = []
    for place, row in enumerate(rows):
        colour, mark = styles[row["variant"]]
        ax.plot([row["p10"], row["p90"]], [place, place], color=colour, linewidth=1.5)
        ax.plot(row["median"], place, mark, color=colour, markersize=6, linestyle="none")
        ax.annotate(
            seconds(row["median"]), (row["p90"], place), (5, 0), textcoords="offset points", va="center", fontsize=7, color=GREY
        )
        if row["floor"] is not None:
            ax.plot([row["floor"]] * 2, [place - 0.4, place + 0.4], color=GREY, linewidth=1.8)
        names.append(row["variant"] + (" (search only)" if row["role"] == "search" else ""))
    ax.set_yticks(range(len(rows)), names, fontsize=8)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(False, axis="y")


AXES = {"N": ("images N", "images"), "T": ("tokens T", "tokens"), "D": ("channels D", "channels")}


def scaling(document: Document, path: Path, dtype: str) -> Path:
    """Three panels, over N, T and D, both axes logarithmic; the floor of the first variant dashed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in document["rows"] if row["dtype"] == dtype]
    styles = style(list(dict.fromkeys(row["variant"] for row in rows)))
    figure, axes = plt.subplots(1, len(AXES), figsize=(12, 4.3), layout="constrained")
    for ax, (axis, (label, key)) in zip(axes, AXES.items(), strict=True):
        mine = [row for row in rows if row["axis"] == axis]
        _plain(ax)
        for name, (colour, mark) in styles.items():
            own = [row for row in mine if row["variant"] == name]
            points = [row[key] for row in own], [row["median"] for row in own]
            ax.plot(*points, marker=mark, color=colour, linewidth=1.2, markersize=5, label=name)
        first = [row for row in mine if row["variant"] == next(iter(styles), None) and row["floor"]]
        floors = [row[key] for row in first], [row["floor"] for row in first]
        ax.plot(*floors, color=GREY, linestyle="--", linewidth=1.2, label=f"floor of {next(iter(styles), '')}")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        sizes = sorted({row[key] for row in mine})
        ax.xaxis.set_major_locator(FixedLocator(sizes))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.tick_params(axis="x", labelsize=8)
        _time_axis(ax.yaxis)
        fixed = {k: v for k, v in _fixed(mine).items() if k != axis}
        ax.set_xlabel(f"{label} (log), at {', '.join(f'{k} = {v}' for k, v in fixed.items())}")
    axes[0].set_ylabel("time of a whole call (log)")
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"NegToMe, one call: scaling, {dtype}\n{caption(document)}", fontsize=10)
    saved = _save(figure, path)
    plt.close(figure)
    return saved


def _fixed(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {axis: rows[0][key] for axis, (_, key) in AXES.items()} if rows else {}


def overhead(documents: Sequence[Document], path: Path) -> Path:
    """What is added to the time of a pipeline or a stack, by ours (with each backend and search) and by the published algorithm."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases: dict[str, dict[str, Mapping[str, Any]]] = {}
    for document in documents:
        for row in document["rows"]:
            cases.setdefault(_end_to_end_name(row), {})[row["variant"]] = row
    own = [
        name for name in dict.fromkeys(name for found in cases.values() for name in found) if name not in ("without", "published")
    ]
    colours = {name: OURS[place % len(OURS)][0] for place, name in enumerate(own)} | {"published": STYLES["release"][0]}
    figure, ax = plt.subplots(figsize=(8.5, TOP + BOTTOM + (0.2 + 0.2 * len(colours)) * len(cases)), layout="constrained")
    _plain(ax)
    ax.grid(False, axis="y")
    height = 0.76 / len(colours)
    named: set[str] = set()
    for place, found in enumerate(cases.values()):
        for number, (name, colour) in enumerate(colours.items()):
            if name not in found:
                continue
            row, at = found[name], place + (number + 0.5) * height - 0.38
            width = 100 * row["overhead"]
            ax.barh(at, width, 0.95 * height, color=colour, label=None if name in named else name)
            named.add(name)
            text = f"{width:+.1f} %  ({seconds(found['without']['median'])} → {seconds(row['median'])})"
            ax.annotate(text, (max(width, 0), at), (4, 0), textcoords="offset points", va="center", fontsize=8, color=GREY)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_xlim(right=1.45 * max(1.0, *(100 * row["overhead"] for found in cases.values() for row in found.values())))
    ax.set_yticks(range(len(cases)), list(cases), fontsize=8)
    ax.set_ylim(len(cases) - 0.5, -0.5)
    ax.set_xlabel("time added, % of the time without NegToMe")
    ax.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(colours))
    figure.suptitle(f"NegToMe, end to end\n{caption(documents[0])}", fontsize=10)
    saved = _save(figure, path)
    plt.close(figure)
    return saved


def _end_to_end_name(row: Mapping[str, Any]) -> str:
    if "pipeline" in row:
        return f"{row['pipeline']}\n{row['images']} images, {row['steps']} steps"
    blocks = "block" if row["layers"] == 1 else "blocks"
    return f"{row['stack']} {row['dtype']}, {row['layers']} {blocks}\n{row['batch']} × {row['tokens']} × {row['channels']}"
