"""What all pictures of results share: colours, and how times and shares are written. Needs no package for plotting."""

from __future__ import annotations

import math
from collections.abc import Sequence

# the palette of Okabe and Ito
BLUE, SKY, GREEN, ORANGE, VERMILION, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
# told apart by marks as well
STYLES = {
    "release": (VERMILION, "s"),
    "release + compile": (VERMILION, "D"),
    "lean": (ORANGE, "s"),
    "lean + compile": (ORANGE, "D"),
    "gemm": ("#000000", "x"),
    "flash-kmeans": (PURPLE, "P"),
}
OURS = ((BLUE, "o"), (SKY, "^"), (GREEN, "v"), (BLUE, "<"), (SKY, ">"), (GREEN, "*"))
UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))
GREY, GRID = "#666666", "#DDDDDD"


def style(variants: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and mark of each variant; those of ours in their order."""
    own = [name for name in variants if name not in STYLES]
    return {name: STYLES[name] if name in STYLES else OURS[own.index(name) % len(OURS)] for name in variants}


def seconds(value: float) -> str:
    """Three digits, no zeros at the end."""
    return _in_unit(value, ".3g")


def precise(value: float) -> str:
    """Four digits, so that a percent can be seen, and as many in every line of a table."""
    return _in_unit(value, "#.4g")


def duration(value: float) -> str:
    """Of what takes long, roughly."""
    if value < 100:
        return f"{value:.0f} s" if value >= 9.5 else seconds(value)
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"


def percent(value: float, sign: str = "+") -> str:
    """With one decimal, none from 100 % on, and a true minus. ``sign``: of what is not negative."""
    digits = 0 if abs(value) >= 0.9995 else 1
    return f"{100 * value:{sign}.{digits}f} %".replace("-", "−")


def axis_seconds(ticks: Sequence[float]) -> list[str]:
    """Of the marks of an axis, which are evenly spaced: one unit, and as many decimals as tell them apart."""
    unit, scale = next(((unit, scale) for unit, scale in UNITS if max(ticks) >= 0.9995 * scale), UNITS[-1])
    return _of_axis([tick / scale for tick in ticks], unit)


def axis_percent(ticks: Sequence[float]) -> list[str]:
    """The same of percents, given as such."""
    return _of_axis(ticks, "%")


def _of_axis(ticks: Sequence[float], unit: str) -> list[str]:
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return [f"{tick:.{digits}f} {unit}".replace("-", "−") for tick in ticks]


def _in_unit(value: float, form: str) -> str:
    for unit, scale in UNITS:
        if value >= 0.9995 * scale or unit == "ns":
            break
    return f"{format(value / scale, form).rstrip('.')} {unit}"
