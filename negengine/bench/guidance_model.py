"""What the static model says of the kernels of guidance: a prediction, never a measurement."""

from __future__ import annotations

import math

import torch

from negengine.bench import launches, model, sass
from negengine.bench.machines import Machine

PASSES = {"guide": 5, "evidence": 5, "nag": 3}  # tensors read and written: with classifier-free guidance, a result written twice
CASES = (  # SD3's and FLUX.1's latents of four images at 1024 x 1024; blocks of SDXL and FLUX.1
    ("guide", (4, 16, 128, 128)),
    ("evidence", (4, 16, 128, 128)),
    ("nag", (4, 4096, 640)),
    ("nag", (4, 4096, 3072)),
)


def moved(operator: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes: each tensor read once and written once."""
    return PASSES[operator] * math.prod(shape) * dtype.itemsize


def floor(operator: str, shape: tuple[int, ...], dtype: torch.dtype, machine: Machine) -> float:
    """Seconds at the bandwidth that a kernel reaches which only reads and writes."""
    return moved(operator, shape, dtype) / (machine.memory * machine.streamed)


def predict(operator: str, shape: tuple[int, ...], dtype: torch.dtype, machine: Machine) -> float:
    """Seconds of the kernel, its launch included."""
    launch = launches.recorded_guidance(operator, shape, dtype, machine.architecture)
    parts = sass.rows_of(sass.instructions(sass.disassembled(launch.cubin)))
    passages = launch.values.get("copies", 1)
    bytes_ = moved(operator, shape, dtype)
    return model.streamed_time(parts, launch, launch.programs, passages, bytes_, machine) + machine.launch
