"""The helpers of this folder are plain modules beside the tests, whatever import mode pytest runs in."""

import logging
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
logging.getLogger("diffusers").setLevel(logging.ERROR)
torch.set_num_threads(1)  # models this small lose more to threads than they gain


@pytest.fixture(params=["flux", "sdxl"])
def family(request):
    return request.param
