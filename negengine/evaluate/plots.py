"""Results as a picture: a panel a metric, a mark a variant, its interval as a bar."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from negengine.metrics.libraries import need

BASE, OTHER, GRID = "#6b7280", "#1d4ed8", "#e5e7eb"


def check() -> None:
    """Raises ImportError if there is nothing to plot with."""
    need("matplotlib", "matplotlib", "the plot (--no-plot leaves it out)")


def plot(told: Mapping[str, Any], path: Path) -> None:
    """Means with intervals over the variants, the base in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    variants, metrics = list(told["variants"]), told["metrics"]
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    size = (4.2 * columns, (0.9 + 0.32 * len(variants)) * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis, (key, about) in zip(axes.flat, metrics.items(), strict=False):
        for place, variant in enumerate(variants):
            row = next(row for row in told["rows"] if (row["variant"], row["metric"]) == (variant, key))
            colour = OTHER if place else BASE
            if row["low"] is not None:
                axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2)
            axis.plot([row["mean"]], [place], "o", color=colour)  # nothing where the mean is unknown
        axis.set_yticks(range(len(variants)), variants)
        axis.set_ylim(len(variants) - 0.5, -0.5)
        arrow = {"higher": " (more is better)", "lower": " (less is better)", None: ""}[about["better"]]
        axis.set_title(f"{about['title']}{arrow}", fontsize=9, loc="left")
        axis.grid(True, axis="x", color=GRID, linewidth=0.6)
        axis.tick_params(labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
