"""Where the time of a step goes: traces of one step in which a method acts and of one in which it rests.

Ranges in the trace are named by step and block, and within a block what a method does there has one of its own. On a GPU they are
NVTX ranges too, for Nsight Systems. All of it is put on for the profiled step and taken off again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity

import negengine
from negengine.bench import whole
from negengine.bench.loops import timed_loop
from negengine.diffusers.apply import _of
from negengine.diffusers.families import find_denoiser
from negengine.diffusers.listen import MethodListener
from negengine.diffusers.places import Place
from negengine.diffusers.session import Session

DEAREST = 10
DOORS = ("enter", "tokens", "leave")
RANGE = "step "  # what the name of every range begins with


def profile(setting: whole.Setting, subject: whole.Subject, folder: Path, say: Callable[[str], object]) -> None:
    """Write ``trace-active.json`` and ``trace-inactive.json`` of our first variant, and tell the dearest operators."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), whole.calibrated(setting, subject) as (threshold, published):
        variant = next(one for one in whole.variants(setting, subject, threshold, published) if one.role == "ours")
        negengine.apply(subject.pipe, *variant.methods)
        try:
            loop = timed_loop(subject.pipe, setting.device, lambda **callback: subject.call(**variant.changes, **callback))
            for name, wanted in (("active", True), ("inactive", False)):
                steps = [number for number, t in enumerate(loop.timesteps) if variant.acts(t) == wanted]
                if not steps:
                    say(f"no trace of an {name} step: {variant.name} has none among {len(loop.timesteps)} steps")
                    continue
                step = steps[min(1, len(steps) - 1)]  # the first one of all has more to do than the others
                found = one_step(setting, subject, variant, step)
                found.export_chrome_trace(str(folder / f"trace-{name}.json"))
                say(f"{variant.name}, step {step}, {name}: {folder / f'trace-{name}.json'}")
                say(dearest(found, setting.device))
        finally:
            negengine.remove(subject.pipe)


def one_step(setting: whole.Setting, subject: whole.Subject, variant: whole.Variant, step: int) -> torch.profiler.profile:
    """The profile of one step of a loop; counted from 0."""
    cuda = setting.device.startswith("cuda")
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda)
    during = contextlib.ExitStack()

    def begins(number: int) -> None:
        if number == step:
            if cuda:
                torch.cuda.synchronize()
            during.enter_context(profiler)
            during.enter_context(ranges(subject.pipe, f"{RANGE}{step}", cuda))

    def ended(pipe: Any, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if number == step:
            if cuda:
                torch.cuda.synchronize()
            during.close()
        begins(number + 1)
        return {}

    loop = MethodListener(subject.pipe, "progress_bar", lambda arguments, result: begins(0))
    try:
        with during:  # also where the loop fails
            subject.call(**variant.changes, callback_on_step_end=ended)
    finally:
        loop.remove()
    return profiler


@contextlib.contextmanager
def ranges(pipe: Any, step: str, nvtx: bool = False) -> Iterator[None]:
    """A ``with`` that is a range itself, and in which every block that methods listen to, and what they do there, is one."""
    denoiser = find_denoiser(pipe)[0]
    with contextlib.ExitStack() as stack:
        for session in _of(denoiser):
            for site in {place.site.name: place.site for place in session.places}.values():
                stack.enter_context(_around(_block(denoiser, site), f"{step}: {site.name}", nvtx))
            for door in DOORS:
                stack.enter_context(_opened(session, door, step, nvtx))
        stack.enter_context(named(step, nvtx))
        yield


@contextlib.contextmanager
def _opened(session: Session, door: str, step: str, nvtx: bool) -> Iterator[None]:
    """A ``with`` in which what methods do at a door is a range."""
    usual = getattr(session, door)

    def heard(tensors: Any, place: Place | None = None) -> Any:
        name = f"{step}: {door}, methods" if place is None else f"{step}: {place.site.name}, methods"
        with named(name, nvtx):
            return usual(tensors) if place is None else usual(tensors, place)

    setattr(session, door, heard)
    try:
        yield
    finally:
        delattr(session, door)


def _block(denoiser: nn.Module, site: Any) -> nn.Module:
    """The module that a site's block is named after; else that which is listened to."""
    return dict(denoiser.named_modules()).get(site.name) or denoiser.get_submodule(site.path)


@contextlib.contextmanager
def _around(module: nn.Module, name: str, nvtx: bool) -> Iterator[None]:
    """A ``with`` in which every call of a module is a range."""
    opened: list[contextlib.AbstractContextManager[None]] = []

    def begins(module: nn.Module, args: Any) -> None:
        opened.append(named(name, nvtx))
        opened[-1].__enter__()

    def ends(module: nn.Module, args: Any, output: Any) -> None:
        opened.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(begins, prepend=True), module.register_forward_hook(ends)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def named(name: str, nvtx: bool) -> Iterator[None]:
    """A range of torch's profiler and, on a GPU, of NVTX."""
    with record_function(name), torch.cuda.nvtx.range(name) if nvtx else contextlib.nullcontext():
        yield


def dearest(profiler: torch.profiler.profile, device: str) -> str:
    """The operators that took the most time themselves, of the device that computes; ranges are none."""
    kind = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    operators = [event for event in profiler.key_averages() if not event.key.startswith(RANGE)]
    whole_time = sum(getattr(event, kind) for event in operators) or 1.0
    operators.sort(key=lambda event: -getattr(event, kind))
    lines = [f"  {'operator':48} {'calls':>6} {'ms':>10} {'share':>7}"]
    for event in operators[:DEAREST]:
        spent = getattr(event, kind)
        lines.append(f"  {event.key[:48]:48} {event.count:6} {spent / 1e3:10.3f} {spent / whole_time:7.1%}")
    return "\n".join(lines)
