"""What each method costs on the embedded pipelines: of the whole, and inside the engine's own hooks and listeners."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import negengine
from negengine import models
from negengine.diffusers.session import Session
from negengine.interleave import interleave
from negengine.methods import Method

PROMPTS, IMAGES = 2, 4
AVOID = "a handwritten three"
WITHOUT, AGAIN = "without", "without again"
# what the engine does itself; `_heard_encode_prompt` contains the encoding of the method's own prompt
DOORS = ("enter", "leave", "tokens", "_heard_set_timesteps", "_heard_step", "_heard_encode_prompt", "_heard_prepare_latents")


def cases(name: str) -> dict[str, tuple[tuple[Method, ...], dict[str, Any]]]:
    """Label -> methods, and what the call needs for them.

    mnist-flux guides by calling its denoiser twice; where a method decides the prediction, it guides in one batch in its place.
    """
    flux = name == "mnist-flux"
    own: dict[str, Any] = {"cfg": models.preset(name).guidance} if flux else {}
    one_call = {"true_cfg_scale": 1.0} if flux else {}
    dng = negengine.DynamicNegativeGuidance(prompt=AVOID, surrogate="ancestral", **own)
    found: dict[str, tuple[tuple[Method, ...], dict[str, Any]]] = {
        "NegToMe": ((models.negtome_preset(name),), {}),
        "DNG": ((dng,), one_call),
        "negative prompting": ((negengine.NegativePrompting(prompt=AVOID, **own),), one_call),
        "SLD": ((negengine.SafeLatentDiffusion.preset("dng", prompt=AVOID),), one_call),
        "NAG": ((negengine.NormalizedAttentionGuidance(negative_prompt=AVOID),), one_call),
        "CADS": ((negengine.CADS(unconditional=flux),), {}),
        "NegToMe + DNG + CADS": ((models.negtome_preset(name), dng, negengine.CADS(unconditional=flux)), one_call),
    }
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
    """One row per method: seconds of a call, its overhead over the pipeline as it is, and milliseconds per step in our own code."""
    about: dict[str, Any] = {"pipeline": name, "images": PROMPTS * IMAGES, "steps": models.preset(name).steps}
    prompts = list(models.PROMPTS[:PROMPTS])
    usual = models.preset(name).call_kwargs(PROMPTS)

    def drawing(pipe: Any, changes: dict[str, Any]) -> Callable[[], Any]:
        call = usual | changes
        return lambda: pipe(prompts, num_images_per_prompt=IMAGES, generator=torch.Generator(device).manual_seed(0), **call)

    plain = models.load(name, device=device)
    calls: dict[str, Callable[[], Any]] = {WITHOUT: drawing(plain, {})}
    if name == "mnist-flux":
        calls[f"{WITHOUT}, one call"] = drawing(plain, {"true_cfg_scale": 1.0})
    found = cases(name)
    for label, (methods, changes) in found.items():
        calls[label] = drawing(negengine.apply(models.load(name, device=device), *methods), changes)
    timings = interleave(calls | {AGAIN: calls[WITHOUT]}, rounds=rounds, warmup=1)
    base = timings[WITHOUT].median
    noise = abs(timings[AGAIN].median / base - 1)
    rows = []
    for label, timing in timings.items():
        if label == AGAIN:
            continue
        inside = None
        if label in found:
            with counted() as spent:
                calls[label]()
            inside = spent[0] / about["steps"]
        rows.append(
            {**about, "method": label, **timing.summary(), "overhead": timing.median / base - 1, "noise": noise, "inside": inside}
        )
    return rows
