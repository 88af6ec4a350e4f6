"""Every method on the embedded pipelines."""

import pytest
import torch

from negengine import models
from negengine.bench import methods

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", models.NAMES)
def test_methods(benchmark, study, name):
    rounds = study.rounds(9 if study.everything else 7)
    study.file("methods").add(benchmark.pedantic(methods.measure_methods, (name, DEVICE, rounds), rounds=1))
