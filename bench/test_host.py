"""What a merging block, an inactive step and a call cost on the host, whatever their size."""

import torch

from negengine.bench import host

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_host(benchmark, study):
    study.file("host").add(benchmark.pedantic(host.measure, (DEVICE, study.rounds(100)), rounds=1))
