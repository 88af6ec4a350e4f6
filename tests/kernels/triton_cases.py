"""What the tests of the Triton kernels share: where they run, their inputs, changed configurations."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from negengine.kernels.triton import launch, rows, tuning

from negengine import ops

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from contract import check_match, same_bits, tokens  # noqa: F401

SHORT = 40  # tokens: two tiles of the interpreter, of which the second is not full
GPU, INTERPRETED = torch.cuda.is_available(), rows.INTERPRETED.value
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"
MARKS = [pytest.mark.gpu] if DEVICE == "cuda" else []
RUNS = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter, with which test_interpreter.py runs it"
)


def batch(dtype=torch.float32, B=3, T=70, D=40, kind="near", seed=1):
    return tokens(kind, B, T, D, seed, dtype, DEVICE)


def outcome(x, table, matching="paper", bank=None, search="auto"):
    match = torch.ops.negengine.match(x, bank, table, None, matching, search, "triton")
    return *match, ops.negtome_(x.clone(), table, 0.9, 0.3, bank=bank, matching=matching, search=search, backend="triton")


def table_of(rows):
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def needs_descriptors():
    if DEVICE == "cuda" and not launch.architecture(torch.device("cuda")).descriptors:
        pytest.skip("this device has no tensor memory accelerator")


def change(monkeypatch, **settings):
    choose = tuning.match_config
    monkeypatch.setattr(tuning, "match_config", lambda *a: dataclasses.replace(choose(*a), **settings))


def needs(search):
    device = launch.architecture(torch.device(DEVICE))
    if search not in device.searches:
        pytest.skip(f"{device.name} has no search={search!r}")
