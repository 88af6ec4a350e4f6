"""Timing of several variants in turn, so that a machine whose speed drifts treats them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Calls = Mapping[str, Callable[[], object]]


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


def interleave(variants: Calls, rounds: int = 15, warmup: int = 2, prepare: Calls | None = None) -> dict[str, Timing]:
    """Call every variant once a round, by the host's clock.

    Args:
        variants: name -> what to time. On a GPU each call is waited for.
        rounds: counted rounds. warmup: rounds before them.
        prepare: name -> what to do before each call, outside of the time.
    """
    prepare = prepare or {}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(warmup + rounds):
        for name, call in variants.items():
            if name in prepare:
                prepare[name]()
            _wait()
            begun = time.perf_counter()
            call()
            _wait()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - begun)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def interleave_graphs(variants: Calls, rounds: int = 15, warmup: int = 2, prepare: Calls | None = None) -> dict[str, Timing]:
    """As :func:`interleave`, by the GPU's clock: every variant is captured once in a CUDA graph, and its replays are timed."""
    prepare, graphs = prepare or {}, {}
    for name, call in variants.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, tunes and fills caches before the capture
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            call()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in variants}
    for round_ in range(warmup + rounds):
        for name, graph in graphs.items():
            if name in prepare:
                prepare[name]()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            if round_ >= warmup:
                events[name].append((begin, end))
        _wait()
    return {name: Timing(tuple(begin.elapsed_time(end) / 1e3 for begin, end in pairs)) for name, pairs in events.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
