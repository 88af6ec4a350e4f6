"""What each method costs on the embedded pipelines: of the whole, and inside the engine's own hooks and listeners."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

import negengine
from negengine import models
from negengine.diffusers.session import Session
from negengine.interleave import Timing, interleave
from negengine.methods import Method

PROMPTS, IMAGES = 2, 4
AVOID = "a handwritten three"
WITHOUT, UNGUIDED, AGAIN = "without", "without guidance", "without again"
# what the engine does itself; `_heard_encode_prompt` contains the encoding of the method's own prompt
DOORS = ("enter", "leave", "tokens", "_heard_set_timesteps", "_heard_step", "_heard_encode_prompt", "_heard_prepare_latents")


class Case(NamedTuple):
    """Methods, what the call needs for them, and the run that they replace."""

    methods: tuple[Method, ...]
    changes: dict[str, Any]
    replaces: str = WITHOUT


def cases(name: str) -> dict[str, Case]:
    """One per method, by its label.

    mnist-flux guides by calling its denoiser twice. A method that brings guidance of its own does that in one batch instead; one
    that steers a model without guidance is compared with a call that has none.
    """
    flux = name == "mnist-flux"
    guidance: dict[str, Any] = {"cfg": models.preset(name).guidance} if flux else {}
    one_call = {"true_cfg_scale": 1.0} if flux else {}
    unguided = UNGUIDED if flux else WITHOUT
    negtome, cads = models.negtome_preset(name), negengine.CADS(unconditional=flux)
    dng = negengine.DynamicNegativeGuidance(prompt=AVOID, surrogate="ancestral", **guidance)
    found = {
        "NegToMe": Case((negtome,), {}),
        "DNG": Case((dng,), one_call),
        "negative prompting": Case((negengine.NegativePrompting(prompt=AVOID, **guidance),), one_call),
        "SLD, DNG's authors'": Case((negengine.SafeLatentDiffusion.preset("dng", prompt=AVOID),), one_call, unguided),
        "NAG": Case((negengine.NormalizedAttentionGuidance(negative_prompt=AVOID),), one_call, unguided),
        "CADS": Case((cads,), {}),
        "seed variance": Case((negengine.SeedVariance(),), one_call, unguided),
        "NegToMe + DNG + CADS": Case((negtome, dng, cads), one_call),
    }
    if not flux:  # these need classifier-free guidance in one batch
        found["SLD, the paper's"] = Case((negengine.SafeLatentDiffusion.preset("medium", prompt=AVOID),), {})
        found["guidance interval"] = Case((negengine.GuidanceInterval(low=0.3, high=5.0),), {})
    return found


@contextmanager
def counted() -> Iterator[list[float]]:
    """A list whose only entry is the seconds spent in :data:`DOORS` so far; a door within a door counts once."""
    spent, depth = [0.0], [0]
    before = {door: getattr(Session, door) for door in DOORS}

    def timed(door: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(door)
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            depth[0] += 1
            try:
                return door(*args, **kwargs)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    spent[0] += time.perf_counter() - begun

        return call

    for name, door in before.items():
        setattr(Session, name, timed(door))
    try:
        yield spent
    finally:
        for name, door in before.items():
            setattr(Session, name, door)


def measure_methods(name: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """One row per method: seconds of a call, its overhead over the run that it replaces, milliseconds per step in our own code."""
    about: dict[str, Any] = {"pipeline": name, "images": PROMPTS * IMAGES, "steps": models.preset(name).steps}
    prompts = list(models.PROMPTS[:PROMPTS])
    usual = models.preset(name).call_kwargs(PROMPTS)

    def drawing(pipe: Any, changes: dict[str, Any]) -> Callable[[], Any]:
        call = usual | changes
        return lambda: pipe(prompts, num_images_per_prompt=IMAGES, generator=torch.Generator(device).manual_seed(0), **call)

    plain = models.load(name, device=device)
    calls: dict[str, Callable[[], Any]] = {WITHOUT: drawing(plain, {})}
    if name == "mnist-flux":
        calls[UNGUIDED] = drawing(plain, {"true_cfg_scale": 1.0})
    found = cases(name)
    for label, case in found.items():
        calls[label] = drawing(negengine.apply(models.load(name, device=device), *case.methods), case.changes)
    timings = interleave(calls | {AGAIN: calls[WITHOUT]}, rounds=rounds, warmup=1)
    noise = abs(_over(timings.pop(AGAIN), timings[WITHOUT]))
    rows = []
    for label, timing in timings.items():
        replaces, inside = WITHOUT, None
        if label in found:
            replaces = found[label].replaces
            with counted() as spent:
                calls[label]()
            inside = spent[0] / about["steps"]
        overhead = _over(timing, timings[replaces])
        of_method = {"method": label, "replaces": replaces, "overhead": overhead, "noise": noise, "inside": inside}
        rows.append({**about, **of_method, **timing.summary()})
    return rows


def _over(timing: Timing, base: Timing) -> float:
    """Share that one takes longer: the median over the rounds, each of which times both, so that a drift of the machine cancels."""
    return statistics.median(a / b for a, b in zip(timing.seconds, base.seconds, strict=True)) - 1
