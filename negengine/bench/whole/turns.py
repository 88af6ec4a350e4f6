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
from negengine.bench.whole.plan import acting, warm_ups
from negengine.bench.whole.setting import AGAIN, WITHOUT, Setting, Variant
from negengine.bench.whole.subjects import Subject


@dataclass
class Timed:
    """The loops of one variant, and what its last one told.

    Attributes:
        warm: what follows is no warm-up. graphs, recompiles: that torch compiled in its loops before that, and since.
    """

    variant: Variant
    warm: bool = False
    graphs: int = 0
    recompiles: int = 0
    loops: list[Loop] = field(default_factory=list)
    merged_share: float | None = None
    peak_bytes: int | None = None
    gpu: dict[str, Any] | None = None


@dataclass
class Turns:
    """What the variants of one way to compile and one attention backend came to, by their names.

    Attributes:
        refused: name -> why it could not be measured.
        interrupted: the user stopped it after at least one whole round; ``timed`` holds the whole rounds.
    """

    timed: dict[str, Timed] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def take_turns(
    setting: Setting,
    subject: Subject,
    found: Sequence[Variant],
    compiled: str | None,
    seconds: float,
    suffix: str,
    say: Callable[[str], object],
) -> Turns:
    """The first loop of each warms up, and the second too where it compiles; where there is no time for more, the last counts.

    Raises:
        KeyboardInterrupt: stopped before a round was whole.
    """
    ends = time.monotonic() + seconds
    turns = _warmed_up(setting, subject, found, compiled, suffix, say)
    timed = turns.timed
    if time.monotonic() + sum(loop.whole for one in timed.values() for loop in one.loops) > ends:
        say("a round would end after the time given: the loops that warmed up count instead")
        _loop(setting, subject, timed[AGAIN])
        return turns
    for one in timed.values():
        one.loops.clear()
    try:
        for number in range(setting.rounds):
            spent = time.monotonic()
            for one in timed.values():
                _loop(setting, subject, one)
            if number + 1 < setting.rounds and 2 * time.monotonic() - spent > ends:
                say(f"{number + 1} of {setting.rounds} rounds: the next would end after the time given")
                break
    except KeyboardInterrupt:
        whole = min(len(one.loops) for one in timed.values())
        if not whole:
            raise
        for one in timed.values():
            del one.loops[whole:]
        turns.interrupted = True
    return turns


def _warmed_up(
    setting: Setting, subject: Subject, found: Sequence[Variant], compiled: str | None, suffix: str, say: Callable[[str], object]
) -> Turns:
    """The variants that can run, each with the last loop of its warm-up; the base once more, without a loop."""
    base, turns = Timed(Variant(WITHOUT, "without")), Turns()
    refusals = (ValueError, NotImplementedError, *([TorchDynamoException] if compiled else []))

    def warm_up(one: Timed) -> None:
        for _ in range(warm_ups(compiled)):
            _loop(setting, subject, one)
        del one.loops[:-1]
        one.warm = True
        say(f"{one.variant.name + suffix}: a loop of {setting.steps} steps takes {precise(one.loops[-1].whole)}")
        turns.timed[one.variant.name] = one

    warm_up(base)
    turns.timed[AGAIN] = Timed(base.variant, warm=True)
    kept, turns.refused = acting(found, base.loops[-1].timesteps)
    for variant in kept:
        try:
            warm_up(Timed(variant))
        except refusals as refusal:
            turns.refused[variant.name] = " ".join(str(refusal).split())
    return turns


def _loop(setting: Setting, subject: Subject, timed: Timed) -> None:
    """One loop of a variant, which is put on before and taken off after it, however it ends."""
    variant, pipe, cuda = timed.variant, subject.pipe, setting.device.startswith("cuda")
    compiled = _graphs()
    try:
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
        kinds = {type(settings) for settings in variant.methods}
        if negengine.NegToMe in kinds and variant.role == "ours":
            timed.merged_share = negengine.status(pipe)[negengine.NegToMe].merged_share
    finally:
        if variant.methods:
            negengine.remove(pipe)
    if timed.warm:
        timed.recompiles += _graphs() - compiled
    else:
        timed.graphs += _graphs() - compiled


def _graphs() -> int:
    """That torch has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


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
