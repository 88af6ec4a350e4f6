"""A pipeline's denoising loop with every step timed, by the device's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from negengine.diffusers.listen import MethodListener


@dataclass(frozen=True)
class Loop:
    """One call of a pipeline, in seconds.

    Attributes:
        whole: of the call. steps: of each step.
        timesteps: at which they were.
    """

    whole: float
    steps: tuple[float, ...]
    timesteps: tuple[float, ...]


class Stopwatch:
    """Marks moments on a device, without a wait between them: CUDA events on a GPU, the host's clock elsewhere."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def between(self) -> list[float]:
        """Seconds from each mark to the next. Waits for the device."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if not self._cuda:
            return [end - begin for begin, end in pairs]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def timed_loop(pipe: Any, device: str, call: Callable[..., object]) -> Loop:
    """``call(callback_on_step_end=...)`` calls ``pipe`` once."""
    steps, whole = Stopwatch(device), Stopwatch(device)

    def step_ended(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.mark()
        return {}

    begins = MethodListener(pipe, "progress_bar", lambda arguments, result: steps.mark())  # the loop is about to begin
    try:
        whole.mark()
        call(callback_on_step_end=step_ended)
        whole.mark()
    finally:
        begins.remove()
    (seconds,) = whole.between()
    return Loop(seconds, tuple(steps.between()), tuple(pipe.scheduler.timesteps.tolist()))
