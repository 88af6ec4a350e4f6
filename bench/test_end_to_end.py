"""Whole pipelines and stacks of real blocks: without, with ours, and with the published algorithm in the same places."""

import pytest
import torch

from negengine import models
from negengine.bench import end_to_end
from negengine.bench.stacks import STACKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float32) if DEVICE == "cpu" else (torch.bfloat16,)


@pytest.mark.parametrize("name", models.NAMES)
def test_pipeline(benchmark, study, name):
    rounds = study.rounds(15 if study.everything else 5)
    found = benchmark.pedantic(end_to_end.measure_pipeline, (name, DEVICE, rounds), rounds=1)
    study.file("pipelines").add(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"][: len(DTYPES)])
@pytest.mark.parametrize("stack", STACKS[DEVICE], ids=lambda stack: stack.name)
def test_stack(benchmark, study, stack, dtype):
    file = study.file("stacks")
    if DEVICE == "cpu" and stack.tokens > 1024 and not study.everything:
        file.add([], None, {f"{stack.name} stack in {dtype}": "takes minutes on a CPU; --all-cases has it"})
        pytest.skip("takes minutes on a CPU; --all-cases runs it")
    rounds = study.rounds(15 if DEVICE == "cuda" else 7 if study.everything else 5)
    file.add(benchmark.pedantic(end_to_end.measure_stack, (stack, dtype, DEVICE, rounds), rounds=1))
