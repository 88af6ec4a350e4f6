"""The figures of bench/dng.py say what its page claims they say."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "bench" / "dng.py"
pytest.importorskip("typer")
spec = importlib.util.spec_from_file_location("dng_study", SCRIPT)
dng = importlib.util.module_from_spec(spec)
sys.modules["dng_study"] = dng
spec.loader.exec_module(dng)


def test_each_image_avoids_its_own_class_or_every_other_one():
    classes = torch.full((36,), 7)
    avoid = dng.assign(classes, None)
    assert (avoid[::2] == 7).all()
    assert sorted(avoid[1::2].tolist()) == sorted([0, 1, 2, 3, 4, 5, 6, 8, 9] * 2)
    assert (dng.assign(classes, 3) == 3).all()


def readings(classes, features, pictures):
    logits = 20 * torch.nn.functional.one_hot(torch.tensor(classes), 10).double()
    return torch.tensor(features, dtype=torch.float64), logits, torch.tensor(pictures)


def test_what_stayed_what_became_and_what_changed():
    before = readings([3, 3, 4, 5, 6], [[1.0, 0], [1, 0], [1, 0], [1, 0], [1, 0]], [0.0] * 5)
    after = readings([3, 8, 4, 3, 1], [[1.0, 0], [0, 1], [2, 0], [0, 1], [-1, 0]], [0.0, 0.9, 0.0, 0.3, 0.6])
    before, after = ((features, logits, p[:, None]) for features, logits, p in (before, after))
    found = dng.compare(before, after, torch.full((5,), 3))
    assert (found["avoided"], found["members"], found["stayed"]) == (2, 2, 1)
    assert (found["others"], found["became"], found["kept"]) == (3, 1, 1)
    assert found["change"] == pytest.approx((0 + 1 + 2) / 3)
    assert found["pixel_change"] == pytest.approx(0.3)
    assert found["read"] == "38431"


def test_frechet_distance_of_known_densities():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T)  # mean 0, covariance 1, exactly
    assert dng.frechet(x, x) == pytest.approx(0, abs=1e-9)
    moved = 2 * x + torch.tensor([3.0, 0, 0], dtype=torch.float64)
    assert dng.frechet(x, moved) == pytest.approx(9 + 3 * (2 - 1) ** 2)


def test_every_cell_has_its_own_file():
    files = [cell.file for cell in dng.cells()]
    assert len(set(files)) == len(files)
