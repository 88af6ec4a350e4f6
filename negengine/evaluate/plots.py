"""Results as a picture: a panel a metric, a mark a variant, its interval as a bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from negengine.metrics.libraries import need

BASE, OTHER, GRID = "#6b7280", "#1d4ed8", "#e5e7eb"
TICKS = 4  # at most, on an axis


def check() -> None:
    """Raises ImportError if there is nothing to plot with."""
    need("matplotlib", "matplotlib", "the plot (--no-plot leaves it out)")


def plot(told: Mapping[str, Any], path: Path) -> None:
    """Means with intervals over the variants, the base in grey."""
    drawn = figure(told)
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(drawn)


def figure(told: Mapping[str, Any]) -> Any:
    """The figure, a panel a metric."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    variants, metrics = list(told["variants"]), told["metrics"]
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    size = (4.2 * columns, (0.9 + 0.32 * len(variants)) * lines)
    drawn, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis, (key, about) in zip(axes.flat, metrics.items(), strict=False):
        rows = {row["variant"]: row for row in told["rows"] if row["metric"] == key}
        _panel(axis, about, [rows[variant] for variant in variants])
    return drawn


def _panel(axis: Any, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for place, row in enumerate(rows):
        colour = OTHER if place else BASE
        if row["low"] is not None:
            axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2)
        if row["mean"] is not None:
            axis.plot(row["mean"], place, "o", color=colour)
    axis.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.xaxis.set_major_locator(MaxNLocator(TICKS))  # more of them overlap where one value alone makes the range narrow
    if about["percent"]:
        axis.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    seer = f", {about['extractor']}" if about["extractor"] else ""
    arrow = {"higher": " (more is better)", "lower": " (less is better)", None: ""}[about["better"]]
    axis.set_title(f"{about['title']}{seer}{arrow}", fontsize=9, loc="left", wrap=True)
    axis.grid(True, axis="x", color=GRID, linewidth=0.6)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
