import pytest
import torch

from negengine.bench.shapes import Shape
from negengine.interleave import Timing
from negengine.ops import registry

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _backends(monkeypatch):
    """The published algorithm registers itself as a backend; other tests must not meet it."""
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))


@pytest.fixture(scope="session")
def small():
    return Shape("small", 3, 64, 48)


@pytest.fixture
def ten():
    return Timing(tuple(float(s) for s in (10, 1, 9, 2, 8, 3, 7, 4, 6, 5)))
