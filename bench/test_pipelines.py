"""The embedded pipelines without and with NegToMe, in turn."""

import pytest
import torch

import negengine
from negengine import models
from negengine.bench import interleave
from negengine.cli.environment import machine, versions

PROMPTS, COUNT = 2, 4


@pytest.mark.parametrize("name", models.NAMES)
def test_pipeline(benchmark, name):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipes = {"without": models.load(name, device=device), "with": models.load(name, device=device)}
    negengine.apply(pipes["with"], models.negtome_preset(name))

    def draw(case):
        generator = torch.Generator(device).manual_seed(0)
        call = models.preset(name).call_kwargs(PROMPTS)
        return pipes[case](list(models.PROMPTS[:PROMPTS]), num_images_per_prompt=COUNT, generator=generator, **call)

    benchmark.pedantic(draw, args=("with",), rounds=1, warmup_rounds=0)
    timings = interleave({case: lambda case=case: draw(case) for case in pipes}, rounds=7, warmup=1)
    benchmark.extra_info |= {
        "seconds": {case: timing.summary() for case, timing in timings.items()},
        "overhead": timings["with"].median / timings["without"].median - 1,
        "status": str(negengine.status(pipes["with"])),
        "machine": machine(),
        "versions": versions(),
    }
