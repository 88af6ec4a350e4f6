"""What a call costs on the host, whatever its size."""

import torch

from negengine.bench import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_dispatch(benchmark, study):
    study.file("dispatch").add(benchmark.pedantic(dispatch.measure, (DEVICE, study.rounds(15)), rounds=1))
