"""The operators of guidance beside plain PyTorch: a table an operator, shape and dtype, all its variants in one interleaved run."""

import pytest
import torch

from negengine.bench import guidance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("case", [*guidance.cases()], ids=lambda case: case.name.replace(" ", "-"))
def test_guidance(benchmark, study, case):
    rows = benchmark.pedantic(guidance.measure, (case, DEVICE), {"rounds": study.rounds(15)}, rounds=1)
    study.file("guidance").add(rows)
