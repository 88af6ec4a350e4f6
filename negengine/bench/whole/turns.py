"""Variants take turns, one loop each per round."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

import negengine
from negengine.bench import ceilings
from negengine.bench.look import precise
from negengine.bench.loops import Loop, timed_loop
from negengine.bench.whole.candidates import uncounted
from negengine.bench.whole.setting import AGAIN, WITHOUT, Setting, Variant
from negengine.bench.whole.subjects import Subject


@dataclass
class Timed:
    """The loops of one variant, and what its last one told."""

    variant: Variant
    loops: list[Loop] = field(default_factory=list)
    merged_share: float | None = None
    peak_bytes: int | None = None
    gpu: dict[str, Any] | None = None


def take_turns(
    setting: Setting,
    subject: Subject,
    found: Sequence[Variant],
    compiled: str | None,
    seconds: float,
    refused: dict[str, str],
    suffix: str,
    say: Callable[[str], object],
) -> dict[str, Timed]:
    """By the variants' names. The first loop of each warms up, and the second too where it compiles; where there is no time for
    more, the last of them counts. ``refused`` is added to."""
    base = Variant(WITHOUT, "without")
    timed: dict[str, Timed] = {}
    timesteps: Sequence[float] = ()
    ends = time.monotonic() + seconds
    refusals = (ValueError, NotImplementedError, *([TorchDynamoException] if compiled else []))
    for variant in (base, *found):
        one = Timed(variant)
        if variant is not base and not any(variant.acts(t) for t in timesteps):
            refused[variant.name] = _outside(variant, timesteps)
            continue
        try:
            for _ in range(2 if compiled else 1):
                _loop(setting, subject, one)
        except refusals as refusal:
            if variant is base:
                raise
            refused[variant.name] = " ".join(str(refusal).split())
            negengine.remove(subject.pipe)
            continue
        warm = one.loops[-1]
        del one.loops[:-1]
        timesteps = warm.timesteps
        say(f"{variant.name + suffix}: a loop of {setting.steps} steps takes {precise(warm.whole)}")
        timed[variant.name] = one
        timed.setdefault(AGAIN, Timed(base))
    if time.monotonic() + sum(loop.whole for one in timed.values() for loop in one.loops) > ends:
        say("a round would end after the time given: the loops that warmed up count instead")
        _loop(setting, subject, timed[AGAIN])
        return timed
    for one in timed.values():
        one.loops.clear()
    for number in range(setting.rounds):
        spent = time.monotonic()
        for one in timed.values():
            _loop(setting, subject, one)
        if number + 1 < setting.rounds and 2 * time.monotonic() - spent > ends:
            say(f"{number + 1} of {setting.rounds} rounds: the next would end after the time given")
            break
    return timed


def _outside(variant: Variant, timesteps: Sequence[float]) -> str:
    low, high = variant.window or (0.0, 1000.0)
    told = ", ".join(f"{t:.0f}" for t in timesteps)
    return f"acts in no step: its window is from {low:g} to {high:g}, the run's timesteps are {told}; take more --steps"


def _loop(setting: Setting, subject: Subject, timed: Timed) -> None:
    """One loop of a variant, which is put on before and taken off after it."""
    variant, pipe, cuda = timed.variant, subject.pipe, setting.device.startswith("cuda")
    if variant.methods:
        negengine.apply(pipe, *variant.methods)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = ceilings.nvml() if cuda else None
    with uncounted() if variant.role == "published" else contextlib.nullcontext():
        timed.loops.append(timed_loop(pipe, setting.device, lambda **callback: subject.call(**variant.changes, **callback)))
    if cuda:
        timed.peak_bytes = torch.cuda.max_memory_allocated()
        timed.gpu = _gpu(before, ceilings.nvml(), setting.images)
    if variant.methods:
        kinds = {type(settings) for settings in variant.methods}
        if negengine.NegToMe in kinds and variant.role == "ours":
            timed.merged_share = negengine.status(pipe)[negengine.NegToMe].merged_share
        negengine.remove(pipe)


def _gpu(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, images: int) -> dict[str, Any] | None:
    """What the GPU's instruments say of one loop; None without them."""
    if before is None or after is None or "refused" in after:
        return None
    energy = [reading.get("energy_mj") for reading in (before, after)]
    counted = all(isinstance(value, int | float) for value in energy)
    return {
        "clock_mhz": _number(after["sm_mhz"]),
        "power_w": None if _number(after["power_mw"]) is None else after["power_mw"] / 1e3,
        "temperature_c": _number(after["celsius"]),
        "throttling": ceilings.throttling(after["throttle_reasons"]),
        "energy_j_per_image": (energy[1] - energy[0]) / 1e3 / images if counted else None,  # type: ignore[operator]
    }


def _number(reading: Any) -> float | None:
    """None where the driver refused to tell."""
    return reading if isinstance(reading, int | float) else None
