"""What would run, before anything does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from negengine.bench import ceilings
from negengine.bench.architectures import ARCHITECTURES
from negengine.bench.footprint import Footprint, footprint
from negengine.bench.look import duration
from negengine.bench.variants import dtype_name
from negengine.bench.whole.candidates import planned
from negengine.bench.whole.plan import GPU_RATE, Plan, check_time, costs_of, measured_rate, plan
from negengine.bench.whole.setting import Setting
from negengine.bench.whole.subjects import check_memory, check_size, sketch

GPUS = (24, 48, 80, 141)  # GB that GPUs have


def no_instruments() -> str | None:
    """Why a GPU's clocks, power and energy cannot be read; None if they can."""
    found = ceilings.nvml()
    if found is None:
        return "pip install nvidia-ml-py" if torch.version.hip is None else "AMD's GPUs have no NVML"
    return found.get("refused")


def there(device: str) -> bool:
    """Whether this machine has it."""
    return not device.startswith("cuda") or torch.cuda.is_available()


def check(settings: Sequence[Setting]) -> None:
    """Raises ValueError: a run of these settings is refused, before anything is made for it."""
    for reason in refusals(settings, measured_rate(settings[0].device, settings[0].dtype)):
        raise ValueError(reason)


def refusals(settings: Sequence[Setting], rate: float) -> Iterator[str]:
    """Why a run would be refused. The memory of a device that is not there is not looked at."""
    found: list[str] = []
    for setting in settings:
        for test in (check_size, *([check_memory] if there(setting.device) else [])):
            try:
                test(setting)
            except ValueError as reason:
                found.append(str(reason))
                break
    yield from found
    if not found:
        try:
            check_time(settings, sketch(settings[0]), rate)
        except ValueError as reason:
            yield str(reason)


def rehearse(settings: Sequence[Setting], say: Callable[[str], object]) -> bool:
    """Say what would run, in which order, with how much memory and for how long; whether the run would not be refused.

    Nothing is allocated but two small matrices, whose product tells how fast this machine is.
    """
    here = there(settings[0].device)
    rate = measured_rate(settings[0].device, settings[0].dtype) if here else GPU_RATE
    whole = 0.0
    for setting in settings:
        try:
            check_size(setting)
        except ValueError:
            continue
        needs = footprint(
            ARCHITECTURES[setting.model],
            setting.depth,
            setting.size,
            setting.images,
            setting.dtype,
            setting.text_encoders,
            setting.vae,
        )
        subject = sketch(setting)
        timesteps = ARCHITECTURES[setting.model].timesteps(setting.size, setting.steps)
        found = plan(setting, subject, planned(setting, subject), timesteps, costs_of(setting, rate))
        seconds = setting.seconds / len(settings)
        for line in (*_needs(setting, needs), *_order(setting, found, seconds)):
            say(line)
        whole += found.seconds(setting.rounds, seconds)
    where = "on this machine, from a small matrix product" if here else "on an H100 or H200"
    if whole:
        say(f"estimated {where}, compilation apart: {duration(whole)}")
    told = list(refusals(settings, rate))
    for reason in told:
        say(f"would be refused: {reason}")
    return not told


def _needs(setting: Setting, needs: Footprint) -> Iterator[str]:
    """Memory and work."""
    depth = "+".join(map(str, setting.depth))
    about = f"{dtype_name(setting.dtype)}, {setting.steps} steps"
    yield f"{setting.model} {depth}, {setting.images} images of {setting.size} x {setting.size}, {about}"
    memory = f"at most {needs.peak / 1e9:.2f} GB, with the published algorithm {needs.published / 1e9:.2f} GB"
    yield f"  memory: weights {needs.weights / 1e9:.2f} GB; {memory}"
    if needs.beside:
        parts = [name for name, taken in (("text encoders", setting.text_encoders), ("VAE", setting.vae)) if taken]
        yield f"  beside it: {' and '.join(parts)} {needs.beside / 1e9:.2f} GB; with them at most {needs.most / 1e9:.2f} GB"
    if setting.device.startswith("cuda"):
        fits = (f"{size} GB: {'fits' if needs.most <= size * 1e9 else 'too little'}" for size in GPUS)
        yield f"  a GPU with {', '.join(fits)}"
    yield f"  work: {needs.flops / 1e12:.1f} TFLOP per forward, {needs.search_flops / 1e12:.2f} TFLOP of search where it merges"


def _order(setting: Setting, found: Plan, seconds: float) -> Iterator[str]:
    """The loops."""
    if found.calibration:
        yield f"  first a step that finds the threshold at which half of the tokens merge: {duration(found.calibration)}"
    yield "  then in turn, a loop each:"
    for name, spent in found.loops.items():
        yield f"    {name}: {duration(spent)}"
    for (compiled, attention), loops, rounds in zip(
        setting.groups, found.groups, found.rounds(setting.rounds, seconds), strict=True
    ):
        counted = f"{rounds} of at most {setting.rounds} rounds" if rounds else "no time for a round, so that these count"
        warm = f"{loops} loop{'s' if loops > 1 else ''} of each to warm up"
        yield f"  {f'compiled: {compiled}' if compiled else 'eager'}, attention {attention}: {warm}, {counted}"
    for name, reason in found.left_out.items():
        yield f"  left out: {name}: {reason}"
