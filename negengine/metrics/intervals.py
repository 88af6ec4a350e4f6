"""How sure a mean is: percentile bootstrap, seeded; Student's t for so few values that resampling them is too sure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
LEVEL, RESAMPLES = 0.95, 4000
ENOUGH = 10  # of three values of one sign no resample has the other sign: the bootstrap would be sure where chance is 1 in 4
PROMPTS = 8  # from so many on, prompts are the units of an interval; of fewer, too little would be left to tell anything


@dataclass(frozen=True)
class Interval:
    """A mean, and between which values it lies at the level asked for; None where one value cannot tell.

    Attributes:
        units: how many independent values, or pairs of them, it rests on; of two unequal numbers the smaller.
    """

    mean: float
    low: float | None
    high: float | None
    units: int = field(default=0, compare=False)

    def within(self, least: float | None, most: float | None) -> Interval:
        """Its part between the values that are possible. None: no bound."""
        if self.low is None or self.high is None:
            return self
        low = self.low if least is None else max(self.low, least)
        return replace(self, low=low, high=self.high if most is None else min(self.high, most))


def units_of(values: Mapping[str, float], prompts: Mapping[str, str | None]) -> tuple[dict[str, float], bool]:
    """Values that may be taken as independent.

    The groups of one prompt at several seeds are alike, so that resampling them singly would be too sure of the mean over prompts.

    Args:
        values: of groups, by their keys. prompts: key -> prompt; None where it is unknown.

    Returns:
        The mean of each prompt, and True, where there are ``PROMPTS`` different prompts or more; else the values, and False.
    """
    of_prompt: dict[str, list[float]] = {}
    for key, value in values.items():
        prompt = prompts.get(key)
        if prompt is None:
            return dict(values), False
        of_prompt.setdefault(prompt, []).append(value)
    if len(of_prompt) < PROMPTS:
        return dict(values), False
    return {prompt: sum(found) / len(found) for prompt, found in of_prompt.items()}, True


def mean_interval(values: Values, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Of the mean of independent values ``[N]``.

    Raises:
        ValueError: no value, another shape, NaN or Inf, or a level outside (0, 1).
    """
    _check(values, level)
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, None, None, 1)
    if len(values) < ENOUGH:
        return replace(_student(mean, _error(values), len(values) - 1, level), units=len(values))
    return replace(_percentiles(mean, _means(values, resamples, np.random.default_rng(seed)), level), units=len(values))


def share_interval(values: Values, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Of the mean of shares. Where all are 0, or all 1, resampling finds nothing else: then Wilson's for so many values.

    Raises:
        ValueError: as :func:`mean_interval`.
    """
    found = mean_interval(values, level, resamples, seed)
    number = len(values)
    if number == 1 or not (np.all(values == 0) or np.all(values == 1)):
        return found.within(0, 1)
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    low, high = (0.0, z2 / (number + z2)) if found.mean == 0 else (number / (number + z2), 1.0)
    return Interval(found.mean, low, high, number)


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
        return Interval(mean, None, None, 1)
    if least < ENOUGH:
        errors = _error(values) ** 2, _error(base) ** 2
        below = errors[0] ** 2 / (len(values) - 1) + errors[1] ** 2 / (len(base) - 1)
        freedom = max(1, math.floor(sum(errors) ** 2 / below)) if below else 1
        return replace(_student(mean, math.sqrt(sum(errors)), freedom, level), units=least)
    generator = np.random.default_rng(seed)
    means = _means(values, resamples, generator) - _means(base, resamples, generator)
    return replace(_percentiles(mean, means, level), units=least)


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
