"""What NegToMe costs a whole pipeline or stack of blocks: without, with ours, with the published algorithm in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

import negengine
from negengine import models
from negengine.bench.interleave import Timing, interleave
from negengine.bench.published import published_backend
from negengine.bench.stacks import IMAGES, Stack, build
from negengine.bench.variants import dtype_name
from negengine.diffusers.families import with_family_defaults

WITHOUT, OURS, PUBLISHED, AGAIN = "without", "negengine", "published", "without (again)"
PROMPTS = 2


def rows(about: Mapping[str, Any], timings: Mapping[str, Timing], merged_share: float) -> list[dict[str, Any]]:
    """One row a variant; ``overhead`` is the median over that of ``without``, minus 1, ``noise`` the same of ``without`` again."""
    base = timings[WITHOUT].median
    noise = abs(timings[AGAIN].median / base - 1)
    found = []
    for name in (WITHOUT, OURS, PUBLISHED):
        timing = timings[name]
        own = {"variant": name, **timing.summary(), "overhead": timing.median / base - 1}
        found.append({**about, **own, "noise": noise, "merged_share": None if name == WITHOUT else merged_share})
    return found


def measure_pipeline(name: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """An embedded pipeline at its preset, image 0 the reference of its group: the only mode that the published code has."""
    settings = dataclasses.replace(models.negtome_preset(name), reference="first")
    pipes = {case: models.load(name, device=device) for case in (WITHOUT, OURS, PUBLISHED)}
    full = with_family_defaults(settings, pipes[OURS])
    theirs = dataclasses.replace(settings, backend=published_backend(IMAGES, full.alpha, full.threshold))
    negengine.apply(pipes[OURS], settings)
    negengine.apply(pipes[PUBLISHED], theirs)

    def draw(pipe: Any) -> Callable[[], Any]:
        call = models.preset(name).call_kwargs(PROMPTS)
        prompts = list(models.PROMPTS[:PROMPTS])
        return lambda: pipe(prompts, num_images_per_prompt=IMAGES, generator=torch.Generator(device).manual_seed(0), **call)

    calls = {case: draw(pipe) for case, pipe in pipes.items()}
    timings = interleave(calls | {AGAIN: calls[WITHOUT]}, rounds=rounds, warmup=1)
    about = {"pipeline": name, "images": PROMPTS * IMAGES, "steps": models.preset(name).steps}
    return rows(about, timings, negengine.status(pipes[OURS]).merged_share)


@torch.inference_mode()
def measure_stack(stack: Stack, dtype: torch.dtype, device: str, rounds: int) -> list[dict[str, Any]]:
    """One forward of a stack, merging active in every attention."""
    own = {WITHOUT: None, OURS: stack.settings, PUBLISHED: dataclasses.replace(stack.settings, backend=stack.published)}
    forwards = {}
    for case, settings in own.items():  # three models with the same weights: nothing is put on or taken off between the calls
        model, forwards[case] = build(stack, dtype, device)
        if settings is not None:
            negengine.apply(model, settings)
        if case == OURS:
            merging = model
    timings = interleave(forwards | {AGAIN: forwards[WITHOUT]}, rounds=rounds, warmup=1)
    about = {
        "stack": stack.name,
        "family": stack.family,
        "tokens": stack.tokens,
        "channels": stack.channels,
        "layers": stack.layers,
        "batch": 2 * IMAGES if stack.family == "sdxl" else IMAGES,
        "dtype": dtype_name(dtype),
    }
    return rows(about, timings, negengine.status(merging).merged_share)
