"""How sure a mean is: percentile bootstrap, seeded; Student's t for so few values that resampling them is too sure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
LEVEL, RESAMPLES = 0.95, 4000
ENOUGH = 10  # of three values of one sign no resample has the other sign: the bootstrap would be sure where chance is 1 in 4


@dataclass(frozen=True)
class Interval:
    """A mean, and between which values it lies at the level asked for; None where one value cannot tell."""

    mean: float
    low: float | None
    high: float | None

    def within(self, least: float, most: float) -> Interval:
        """Its part between the values that are possible."""
        if self.low is None or self.high is None:
            return self
        return Interval(self.mean, max(self.low, least), min(self.high, most))


def mean_interval(values: Values, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Of the mean of independent values ``[N]``.

    Raises:
        ValueError: no value, another shape, NaN or Inf, or a level outside (0, 1).
    """
    _check(values, level)
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, None, None)
    if len(values) < ENOUGH:
        return _student(mean, _error(values), len(values) - 1, level)
    return _percentiles(mean, _means(values, resamples, np.random.default_rng(seed)), level)


def difference_interval(
    values: Values, base: Values, paired: bool, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Of the difference of two means, ``values - base``.

    Args:
        paired: value i of both belongs to the same thing (prompt and seed), so that the differences count. Otherwise, for few
            values, Welch's t with its degrees of freedom rounded down.

    Raises:
        ValueError: as :func:`mean_interval`; and paired values of unequal number.
    """
    _check(values, level)
    _check(base, level)
    if paired:
        if len(values) != len(base):
            raise ValueError(f"paired values must be equally many, got {len(values)} and {len(base)}")
        return mean_interval(values - base, level, resamples, seed)
    mean, least = float(values.mean() - base.mean()), min(len(values), len(base))
    if least == 1:
        return Interval(mean, None, None)
    if least < ENOUGH:
        errors = _error(values) ** 2, _error(base) ** 2
        below = errors[0] ** 2 / (len(values) - 1) + errors[1] ** 2 / (len(base) - 1)
        freedom = max(1, math.floor(sum(errors) ** 2 / below)) if below else 1
        return _student(mean, math.sqrt(sum(errors)), freedom, level)
    generator = np.random.default_rng(seed)
    return _percentiles(mean, _means(values, resamples, generator) - _means(base, resamples, generator), level)


def student_quantile(probability: float, freedom: int) -> float:
    """Of Student's t with ``freedom`` degrees, for a probability in [0.5, 1): the finite series of Abramowitz and Stegun 26.7.3."""
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, freedom: int) -> float:
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + inside / 2


def _check(values: Values, level: float) -> None:
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must have shape [N] with N >= 1, got {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError("values contain NaN or Inf")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")


def _error(values: Values) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _means(values: Values, resamples: int, generator: np.random.Generator) -> Values:
    return values[generator.integers(len(values), size=(resamples, len(values)))].mean(1)


def _student(mean: float, error: float, freedom: int, level: float) -> Interval:
    wide = student_quantile((1 + level) / 2, freedom) * error
    return Interval(mean, mean - wide, mean + wide)


def _percentiles(mean: float, means: Values, level: float) -> Interval:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))
