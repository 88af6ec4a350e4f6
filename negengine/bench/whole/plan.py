"""What a run would do, in which order and how long it would take, known before it begins."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from negengine.bench.architectures import ARCHITECTURES
from negengine.bench.footprint import footprint, largest_within
from negengine.bench.look import duration
from negengine.bench.loops import timed_loop
from negengine.bench.whole.candidates import planned
from negengine.bench.whole.setting import AGAIN, WITHOUT, Setting, Variant
from negengine.bench.whole.subjects import Subject
from negengine.diffusers.effects import EFFECTS
from negengine.diffusers.families import find_denoiser

SHARE = 0.65  # of a bare matrix product's rate that whole forwards reach: 0.63 to 0.80 on two CPU cores at true width
PROBED = 0.5  # seconds for which a matrix product is repeated
GPU_RATE = 0.4e15  # FLOP/s of whole forwards on an H100 or H200, for estimates where there is none


@dataclass(frozen=True)
class Costs:
    """In seconds.

    Attributes:
        step: without a method. search: of NegToMe, in a step in which it acts. beside: of a loop, apart from its steps.
    """

    step: float
    search: float = 0.0
    beside: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a run does: calibration, then for each way to compile and attention backend the loops that warm up, and rounds.

    Attributes:
        loops: seconds of a loop of each variant, in the order of a round.
        left_out: variants that act in no step, and why.
        calibration: seconds.
        groups: how many loops of each variant warm up, group by group.
    """

    loops: Mapping[str, float]
    left_out: Mapping[str, str]
    calibration: float
    groups: Sequence[int]

    @property
    def round(self) -> float:
        return sum(self.loops.values())

    @property
    def warm_up(self) -> float:
        return sum(self.groups) * (self.round - self.loops[AGAIN])

    @property
    def least(self) -> float:
        """Where there is no time for a round, one loop more follows those that warm up, which count then."""
        return self.calibration + self.warm_up + len(self.groups) * self.loops[AGAIN]

    def rounds(self, most: int, seconds: float) -> list[int]:
        """How many fit in the time, group by group; 0 where the loops that warm up count instead."""
        found, left = [], seconds - self.calibration
        for loops in self.groups:
            left -= loops * (self.round - self.loops[AGAIN])
            found.append(max(0, min(most, int(left / self.round))))
            left -= found[-1] * self.round if found[-1] else self.loops[AGAIN]
        return found

    def seconds(self, most: int, seconds: float) -> float:
        """That the whole run takes."""
        rounds = self.rounds(most, seconds)
        return self.calibration + self.warm_up + sum(number * self.round or self.loops[AGAIN] for number in rounds)


def warm_ups(compiled: str | None) -> int:
    """Loops of each variant before a round: compiling takes two."""
    return 1 if compiled is None else 2


def acting(found: Iterable[Variant], timesteps: Sequence[float]) -> tuple[list[Variant], dict[str, str]]:
    """The variants that act in a step of the run, and why the others are left out."""
    kept, left_out = [], {}
    for variant in found:
        if any(variant.acts(t) for t in timesteps):
            kept.append(variant)
        else:
            left_out[variant.name] = _outside(variant, timesteps)
    return kept, left_out


def _outside(variant: Variant, timesteps: Sequence[float]) -> str:
    low, high = variant.window or (0.0, 1000.0)
    told = ", ".join(f"{t:.0f}" for t in timesteps)
    return f"acts in no step: its window is from {low:g} to {high:g}, the run's timesteps are {told}; take more --steps"


def plan(setting: Setting, subject: Subject, found: Sequence[Variant], timesteps: Sequence[float], costs: Costs) -> Plan:
    """Of a pipeline, whose denoiser need not have any weights."""
    kept, left_out = acting(found, timesteps)
    plain = costs.beside + setting.steps * costs.step
    loops = {WITHOUT: plain, AGAIN: plain}
    for variant in kept:
        more = costs.step * joined(variant, subject)
        more += costs.search if any(settings.name == "negtome" for settings in variant.methods) else 0.0
        loops[variant.name] = plain + more * sum(variant.acts(t) for t in timesteps)
    calibrates = subject.architecture is not None and "negtome" in setting.methods
    calibration = costs.beside + costs.step + costs.search if calibrates else 0.0
    return Plan(loops, left_out, calibration, [warm_ups(compiled) for compiled, _ in setting.groups])


def joined(variant: Variant, subject: Subject) -> float:
    """Rows that a variant joins to the denoiser's batch, for each of its own."""
    denoiser, family = find_denoiser(subject.pipe)
    halves = subject.architecture.halves if subject.architecture is not None else 1
    rows = 0
    for settings in variant.methods:
        if settings.name == "negtome":  # which joins rows for pictures alone
            continue
        effect = EFFECTS[type(settings)](settings, family, denoiser)
        rows += effect.branches or (settings.name == "nag" and effect.joining)
    return rows / halves


def costs_of(setting: Setting, rate: float) -> Costs:
    """Of an architecture, at so many operations per second of whole forwards."""
    needs = footprint(ARCHITECTURES[setting.model], setting.depth, setting.size, setting.images, setting.dtype)
    return Costs(needs.flops / rate, needs.search_flops / rate)


def measured_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second that whole forwards reach here, from the fastest of many small matrix products."""
    cuda = device.startswith("cuda")
    side = 8192 if cuda else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    spent: list[float] = []
    begun = time.perf_counter()
    while len(spent) < 3 or time.perf_counter() - begun < PROBED:
        before = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - before)
    return SHARE * 2 * side**3 / min(spent)


def check_time(settings: Sequence[Setting], subject: Subject, rate: float) -> None:
    """Raises ValueError: the run would not end within its time; names the depth, the steps or the size that would."""
    needed = sum(_least(setting, subject, rate) for setting in settings)
    seconds = settings[0].seconds
    if needed > seconds:
        named = _shorter(settings[0], subject, rate) if len(settings) == 1 else [f"fewer than these {len(settings)} cases"]
        raise ValueError(too_long(needed, seconds, named))


def check_loaded(setting: Setting, subject: Subject) -> None:
    """As :func:`check_time`, of a checkpoint, whose steps are timed: one loop of one step warms up, another counts."""
    with torch.no_grad():
        one = [timed_loop(subject.pipe, setting.device, partial(subject.call, num_inference_steps=1)) for _ in range(2)][-1]
    costs, found = Costs(step=one.steps[0], beside=one.whole - one.steps[0]), planned(setting, subject)

    def least(steps: int) -> float:  # as if all of them acted in every step
        return plan(replace(setting, steps=steps), subject, found, [1000.0] * steps, costs).least

    if (needed := least(setting.steps)) > setting.seconds:
        fits = largest_within(1, setting.steps, least, setting.seconds)
        raise ValueError(too_long(needed, setting.seconds, [] if fits is None else [f"--steps {fits}"]))


def too_long(needed: float, seconds: float, named: Sequence[str]) -> str:
    fits = f"; what fits: {', or '.join(named)}" if named else ""
    return (
        f"calibration, warm-up and a last loop would take about {duration(needed)}, compilation apart, and --seconds is {seconds:g}"
        f"{fits}; --seconds {1.2 * needed:.0f} permits it as it is"
    )


def _least(setting: Setting, subject: Subject, rate: float) -> float:
    timesteps = ARCHITECTURES[setting.model].timesteps(setting.size, setting.steps)
    return plan(setting, subject, planned(setting, subject), timesteps, costs_of(setting, rate)).least


def _shorter(setting: Setting, subject: Subject, rate: float) -> list[str]:
    """The largest depth, number of steps and size with which a run ends in its time."""
    architecture = ARCHITECTURES[setting.model]

    def least(**changes: Any) -> float:
        return _least(replace(setting, **changes), subject, rate)

    depths = [(max(1, setting.depth[0] * share // 8), max(1, setting.depth[1] * share // 8)) for share in range(7, 0, -1)]
    depth = next((one for one in depths if least(depth=one) <= setting.seconds), None)
    named = [] if depth is None else [f"--depth {depth[0]}+{depth[1]}"]
    few = fewest_steps(setting, planned(setting, subject))
    steps = largest_within(few, setting.steps, lambda steps: least(steps=steps), setting.seconds)
    named += [] if steps is None else [f"--steps {steps}"]
    stride = architecture.stride
    sides = largest_within(1, setting.size // stride, lambda side: least(size=side * stride), setting.seconds, power=2)
    if sides is not None and ("negtome" not in setting.methods or costs_of(replace(setting, size=sides * stride), rate).search):
        named.append(f"--size {sides * stride}")
    return named


def fewest_steps(setting: Setting, found: Sequence[Variant]) -> int:
    """With which as many variants act as with the setting's."""
    architecture = ARCHITECTURES[setting.model]

    def act(steps: int) -> int:
        return len(acting(found, architecture.timesteps(setting.size, steps))[0])

    return next(steps for steps in range(1, setting.steps + 1) if act(steps) >= act(setting.steps))
