import pytest
import torch

from negengine.bench.shapes import Shape
from negengine.diffusers import families
from negengine.interleave import Timing
from negengine.ops import registry

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_stays_registered():
    """Measuring leaves no backend and no family behind: users would find them in `ops.backends()` and in error messages."""
    before = list(registry._BACKENDS), list(families._FAMILIES)
    yield
    assert (list(registry._BACKENDS), list(families._FAMILIES)) == before


@pytest.fixture(scope="session")
def small():
    return Shape("small", 3, 64, 48)


@pytest.fixture
def ten():
    return Timing(tuple(float(s) for s in (10, 1, 9, 2, 8, 3, 7, 4, 6, 5)))
