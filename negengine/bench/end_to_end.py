"""What NegToMe costs a whole pipeline or stack of blocks: without, with ours, with the published algorithm in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

import negengine
from negengine import models
from negengine.bench.published import published_backend
from negengine.bench.stacks import IMAGES, TRANSFORMER_BLOCKS, Stack, build
from negengine.bench.variants import dtype_name, usable
from negengine.diffusers import families
from negengine.interleave import Timing, interleave
from negengine.ops import registry

WITHOUT, PUBLISHED, AGAIN = "without", "published", "without (again)"
PROMPTS = 2


def engines(device: str, dtype: torch.dtype) -> dict[str, tuple[str, str]]:
    """Name -> backend and search of ours: the preferred on a CPU; on a GPU, whose kernels wait to be asked for, all there are."""
    found = usable(device, dtype)
    return {" ".join(own): own for own in found[: None if device == "cuda" else 1]}


def rows(about: Mapping[str, Any], timings: Mapping[str, Timing], shares: Mapping[str, float]) -> list[dict[str, Any]]:
    """One row a variant; ``overhead`` is the median over that of ``without``, minus 1, ``noise`` the same of ``without`` again.

    Args:
        shares: variant -> share of the tokens with a reference that it merged, where that is counted.
    """
    base = timings[WITHOUT].median
    noise = abs(timings[AGAIN].median / base - 1)
    found = []
    for name, timing in timings.items():
        if name != AGAIN:
            own = {"variant": name, **timing.summary(), "overhead": timing.median / base - 1}
            found.append({**about, **own, "noise": noise, "merged_share": shares.get(name)})
    return found


def measure_pipeline(name: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """An embedded pipeline at its preset, image 0 the reference of its group: the only mode that the published code has."""
    settings = dataclasses.replace(models.negtome_preset(name), reference="first")
    plain = models.load(name, device=device)
    pipes = {WITHOUT: plain}
    for case, (backend, search) in engines(device, plain.dtype).items():
        own = dataclasses.replace(settings, backend=backend, search=search)
        pipes[case] = negengine.apply(models.load(name, device=device), own)

    def draw(pipe: Any) -> Callable[[], Any]:
        call = models.preset(name).call_kwargs(PROMPTS)
        prompts = list(models.PROMPTS[:PROMPTS])
        return lambda: pipe(prompts, num_images_per_prompt=IMAGES, generator=torch.Generator(device).manual_seed(0), **call)

    full: Any = families.with_family_defaults(settings, plain)
    with registry.registered(published_backend(IMAGES, full.alpha, full.threshold)) as published:
        theirs = dataclasses.replace(settings, backend=published.name)
        pipes[PUBLISHED] = negengine.apply(models.load(name, device=device), theirs)
        calls = {case: draw(pipe) for case, pipe in pipes.items()}
        timings = interleave(calls | {AGAIN: calls[WITHOUT]}, rounds=rounds, warmup=1)
    about = {"pipeline": name, "images": PROMPTS * IMAGES, "steps": models.preset(name).steps}
    return rows(about, timings, _shares(pipes))


@torch.inference_mode()
@families.registered(TRANSFORMER_BLOCKS)
def measure_stack(stack: Stack, dtype: torch.dtype, device: str, rounds: int) -> list[dict[str, Any]]:
    """One forward of a stack, merging active in every attention."""
    found = engines(device, dtype).items()
    settings = {case: dataclasses.replace(stack.settings, backend=backend, search=search) for case, (backend, search) in found}
    built, forwards = {}, {}
    with registry.registered(stack.published) as published:
        settings[PUBLISHED] = dataclasses.replace(stack.settings, backend=published.name)
        # models with the same weights: nothing is put on or taken off between the calls
        for case in (WITHOUT, *settings):
            built[case], forwards[case] = build(stack, dtype, device)
            if case in settings:
                negengine.apply(built[case], settings[case])
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
    return rows(about, timings, _shares(built))


def _shares(applied: Mapping[str, Any]) -> dict[str, float]:
    return {
        case: negengine.status(target)[negengine.NegToMe].merged_share
        for case, target in applied.items()
        if case not in (WITHOUT, PUBLISHED)
    }
