"""The plots of docs/evidence.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Told = Mapping[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555")


def _row(told: Told, job: str, variant: str, metric: str) -> Mapping[str, Any]:
    return next(row for row in told["rows"] if (row["job"], row["variant"], row["metric"]) == (job, variant, metric))


def _variants(told: Told, job: str) -> list[str]:
    return list(dict.fromkeys(row["variant"] for row in told["rows"] if row["job"] == job))


def _line(axis: Any, xs: Sequence[float], rows: Sequence[Mapping[str, Any]], scale: float = 1, **style: Any) -> None:
    """Means with their intervals."""
    means = [scale * row["mean"] for row in rows]
    low, high = ([scale * (row[end] if row[end] is not None else row["mean"]) for row in rows] for end in ("low", "high"))
    errors = [
        [mean - one for mean, one in zip(means, low, strict=True)],
        [one - mean for mean, one in zip(means, high, strict=True)],
    ]
    axis.errorbar(xs, means, errors, marker="o", markersize=4, capsize=2, **style)


def diversity(told: Told, path: Path) -> None:
    """Distinct looks and fidelity over alpha and over guidance."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex="col", layout="constrained")
    metrics = (("distinct:people-look", "distinct looks of 4", 1.0), ("as-prompted", "profession as prompted, %", 100.0))
    variants = _variants(told, "alpha")
    lines: dict[str, list[tuple[float, str]]] = {}
    for variant in variants[1:]:
        kind, _, alpha = variant.rpartition(", ")
        lines.setdefault(kind, [(0.0, variants[0])]).append((float(alpha), variant))
    for axis, (metric, title, scale) in zip(axes[:, 0], metrics, strict=True):
        for (kind, points), colour in zip(lines.items(), COLOURS, strict=False):
            rows = [_row(told, "alpha", variant, metric) for _, variant in points]
            _line(axis, [alpha for alpha, _ in points], rows, scale, color=colour, label=kind)
        axis.set_ylabel(title)
    found: dict[str, list[tuple[float, str]]] = {}
    for variant in _variants(told, "guidance"):
        name, _, at = variant.partition(", ")
        found.setdefault(name, []).append((float(at), variant))
    for axis, (metric, _, scale) in zip(axes[:, 1], metrics, strict=True):
        for (name, points), colour in zip(found.items(), (COLOURS[-1], COLOURS[0]), strict=True):
            rows = [_row(told, "guidance", variant, metric) for _, variant in points]
            _line(axis, [at for at, _ in points], rows, scale, color=colour, label=name)
    axes[1, 0].set_xlabel("alpha (0: without NegToMe)")
    axes[1, 1].set_xlabel("scale of classifier-free guidance")
    _finish(figure, axes.flat, path, "people-flux: diversity within groups of four, and fidelity")


def removal(told: Told, path: Path) -> None:
    """What is left of what is forbidden against what else changed; at each mark its scale."""
    jobs = list(dict.fromkeys(row["job"] for row in told["rows"]))
    metrics = (("kl", "KL of the rest, bits"), ("fid", "FID to what is allowed"))
    figure, axes = plt.subplots(len(jobs), 2, figsize=(10, 0.6 + 3.8 * len(jobs)), squeeze=False, layout="constrained")
    for line, job in zip(axes, jobs, strict=True):
        for axis, (metric, title) in zip(line, metrics, strict=True):
            _left_against(told, job, metric, axis)
            axis.set_ylabel(title)
            axis.set_title(job.rpartition(", ")[2], fontsize=10)
            axis.set_xlabel("images that show what is forbidden, %")
    _finish(figure, axes.flat, path, "Removing a style: lower left is better")


def _left_against(told: Told, job: str, metric: str, axis: Any) -> None:
    base, *others = _variants(told, job)
    kinds: dict[str, list[str]] = {}
    for variant in others:
        kinds.setdefault(variant.rpartition(" ")[0], []).append(variant)
    left = {variant: 100 * _row(told, job, variant, "forbidden")["mean"] for variant in (base, *others)}
    axis.plot(left[base], _row(told, job, base, metric)["mean"], "*", color=COLOURS[-1], markersize=12, label=base)
    for (kind, variants), colour in zip(kinds.items(), COLOURS, strict=False):
        values = [_row(told, job, variant, metric)["mean"] for variant in variants]
        axis.plot([left[variant] for variant in variants], values, "o-", color=colour, label=kind)
        for variant, value in zip(variants, values, strict=True):
            text = variant.rpartition(" ")[2]
            axis.annotate(text, (left[variant], value), (4, 5), textcoords="offset points", fontsize=8, color=colour)


def posterior(told: Told, path: Path) -> None:
    """The estimate over the steps, median and 10th to 90th percentile."""
    traces = told["posterior"]
    models = list(dict.fromkeys(name.split(", ")[1] for name in traces))
    names = {"watched": "watched only (scale 0)", "guided": "guided (scale 10)"}
    size = (10, 0.6 + 3.8 * len(models))
    figure, axes = plt.subplots(len(models), 2, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    for line, model in zip(axes, models, strict=True):
        for axis, (variant, title) in zip(line, names.items(), strict=True):
            groups = [
                (f"{prompts} prompt, images that {group}", of)
                for prompts in ("related", "unrelated")
                for group, of in traces.get(f"{prompts}, {model}, {variant}", {}).items()
            ]
            for (label, of), colour in zip(groups, ("#D55E00", "#0072B2", "#999999", "#555555"), strict=False):
                steps = range(len(of["p50"]))
                axis.fill_between(steps, of["p10"], of["p90"], color=colour, alpha=0.2, linewidth=0)
                axis.plot(steps, of["p50"], color=colour, label=f"{label} ({of['images']})")
            axis.set_yscale("log")
            axis.set_title(f"{model}, {title}", fontsize=10)
            axis.set_xlabel("after step")
        line[0].set_ylabel("p, the estimate that the image\nshows what is to be avoided")
    _finish(figure, axes.flat, path, "DNG's estimate over the steps")


def _finish(figure: Any, axes: Any, path: Path, title: str) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
