"""Checks that the settings of all methods share. Each returns the value in its stored form, or raises and says what would work."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence


def number(name: str, value: object) -> float:
    """A finite real number. Raises TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def between(name: str, value: object, low: float, high: float, ends: str = "[]") -> float:
    """A number from ``low`` to ``high``; a round bracket in ``ends`` leaves that end out. Raises TypeError, ValueError."""
    x = number(name, value)
    if not (low <= x <= high) or (ends[0] == "(" and x == low) or (ends[1] == ")" and x == high):
        raise ValueError(f"{name} must lie in {ends[0]}{low:g}, {high:g}{ends[1]}, got {value}")
    return x


def share(name: str, value: object) -> float:
    """A number in ``[0, 1)``. Raises TypeError, ValueError."""
    return between(name, value, 0, 1, "[)")


def at_least(name: str, value: object, low: float) -> float:
    """A number of at least ``low``. Raises TypeError, ValueError."""
    x = number(name, value)
    if x < low:
        raise ValueError(f"{name} must be {low:g} or more, got {value}")
    return x


def not_negative(name: str, value: object) -> float:
    """A number of at least 0. Raises TypeError, ValueError."""
    return at_least(name, value, 0)


def positive(name: str, value: object) -> float:
    """A number above 0. Raises TypeError, ValueError."""
    x = number(name, value)
    if x <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return x


def positive_integer(name: str, value: object) -> int:
    """An integer of at least 1. Raises ValueError, also for what is no integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def count(name: str, value: object) -> int:
    """An integer of at least 0. Raises ValueError, also for what is no integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be 0 or a positive integer, got {value!r}")
    return value


def flag(name: str, value: object) -> bool:
    """True or False. Raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def seed(value: object) -> int:
    """A generator's seed, below 2**32 in size. Raises TypeError, ValueError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"seed must be an integer, got {value!r}")
    if abs(value) >= 2**32:
        raise ValueError(f"seed must lie between -2**32 and 2**32, got {value}")
    return value


def choice(name: str, value: object, known: tuple[object, ...]) -> object:
    """One of ``known``. Raises ValueError."""
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")
    return value


def pair(name: str, value: object) -> tuple[float, float]:
    """``(low, high)``: two numbers in any order. Raises TypeError, ValueError."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"{name} must be (low, high), got {value!r}")
    low, high = (number(name, v) for v in value)
    return low, high


def window(value: object, what: str) -> tuple[float, float]:
    """``(low, high)`` timesteps of 1000 in which ``what`` (a word for the error: "merging") is active.

    Raises:
        TypeError, ValueError: no pair of numbers, an empty window, or one that lies outside 0 … 1000.
    """
    low, high = pair("timesteps", value)
    if low > high:
        raise ValueError(f"the timestep window {low:g} … {high:g} is empty; give (low, high) with low <= high")
    if high < 0 or low > 1000:
        raise ValueError(f"the timestep window {low:g} … {high:g} lies outside 0 … 1000, so {what} would never be active")
    return low, high


def blocks(value: object, done: str) -> tuple[str, ...]:
    """Names of attention blocks; ``done`` says what happens there, for the error: "merged". Raises TypeError, ValueError."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"blocks must be a sequence of names, got {value!r}")
    if not value:
        raise ValueError(f"blocks is empty, so nothing would be {done}; leave it out for the family's default")
    return tuple(value)
