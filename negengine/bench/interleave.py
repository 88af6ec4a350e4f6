"""Timing of several variants in turn, so that a machine whose speed drifts treats them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one variant."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def percentile(self, p: float) -> float:
        """The ``p``-th percentile (0 … 100), linearly interpolated."""
        return float(torch.quantile(torch.tensor(self.seconds, dtype=torch.float64), p / 100))

    def summary(self) -> dict[str, float]:
        return {"median": self.median, "p10": self.percentile(10), "p90": self.percentile(90), "rounds": len(self.seconds)}


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int = 15, warmup: int = 2) -> dict[str, Timing]:
    """Call every variant once a round.

    Args:
        variants: name -> what to time. On a GPU each call is waited for.
        rounds: counted rounds. warmup: rounds before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(warmup + rounds):
        for name, call in variants.items():
            _wait()
            begun = time.perf_counter()
            call()
            _wait()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - begun)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
