"""What would run, before anything does."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from negengine.bench import ceilings
from negengine.bench.architectures import ARCHITECTURES
from negengine.bench.footprint import footprint
from negengine.bench.whole.setting import AGAIN, PUBLISHED, WITHOUT, Setting

RATES = {"an H100 or H200": 0.4e15, "two CPU cores": 0.4e12}  # FLOP/s that whole forwards reach, roughly; for estimates of time


def no_instruments() -> str | None:
    """Why a GPU's clocks, power and energy cannot be read; None if they can."""
    found = ceilings.nvml()
    if found is None:
        return "pip install nvidia-ml-py" if torch.version.hip is None else "AMD's GPUs have no NVML"
    return found.get("refused")


def rehearsal(setting: Setting) -> Iterator[str]:
    """What would run: the variants, what they need and compute. Nothing is allocated."""
    architecture = ARCHITECTURES.get(setting.model)
    if architecture is None:
        raise ValueError(
            f"only {' and '.join(ARCHITECTURES)} can be rehearsed; of a checkpoint nothing is known before it is loaded"
        )
    architecture.check_size(setting.size)
    needs = footprint(architecture, setting.depth, setting.size, setting.images, setting.dtype, setting.text_encoders, setting.vae)
    depth = "+".join(map(str, setting.depth))
    yield f"{setting.model} {depth}, {setting.images} images of {setting.size} x {setting.size}, {setting.steps} steps"
    memory = f"at most {needs.peak / 1e9:.2f} GB, with the published algorithm {needs.published / 1e9:.2f} GB"
    yield f"  memory: weights {needs.weights / 1e9:.2f} GB; {memory}"
    if needs.beside:
        parts = [name for name, taken in (("text encoders", setting.text_encoders), ("VAE", setting.vae)) if taken]
        yield f"  beside it: {' and '.join(parts)} {needs.beside / 1e9:.2f} GB; with them at most {needs.most / 1e9:.2f} GB"
    yield f"  work: {needs.flops / 1e12:.1f} TFLOP per forward, {needs.search_flops / 1e12:.2f} TFLOP of search where it merges"
    ways, backends = setting.ways, setting.attention
    names = [WITHOUT, *setting.methods, *([PUBLISHED] if "negtome" in setting.methods else []), AGAIN]
    loops = len(ways) * len(backends) * len(names) * (setting.rounds + 1)
    yield f"  in this order, {setting.rounds} rounds at most and one to warm up: {', '.join(names)}"
    yield f"  each {', then compiled: '.join(way or 'eager' for way in ways)}; attention: {', '.join(backends)}; {loops} loops"
    for name, rate in RATES.items():
        yield f"  estimated on {name}: {loops * setting.steps * needs.flops / rate / 60:.0f} minutes"
