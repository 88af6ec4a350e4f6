"""Whole denoising loops of FLUX.1-dev and SDXL-base with random weights, as `negengine bench model` measures them."""

import pytest
import torch

from negengine.bench import whole
from negengine.bench.architectures import ARCHITECTURES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# depth, pixels of a side, images, steps: on a CPU what two cores do in two minutes
SMALL = {"flux-dev": ("1+1", 512, 2, 2), "sdxl-base": ("1+1", 512, 2, 2)}
TRUE = {"flux-dev": (None, 1024, 4, 25), "sdxl-base": (None, 1024, 4, 50)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loop(benchmark, study, name):
    depth, size, images, steps = (SMALL if DEVICE == "cpu" else TRUE)[name]
    setting = whole.Setting(
        name, ARCHITECTURES[name].depth(depth), size, images, steps, DEVICE, rounds=study.rounds(3), seconds=120
    )
    measured = benchmark.pedantic(lambda: whole.measure(setting, whole.subject(setting)), rounds=1)
    study.file("model").add(measured.rows, None, measured.left_out)
