"""Distances of sets against their definitions; torchmetrics and torch-fidelity compute them where they are installed."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from negengine import metrics


def normal(n, f, seed, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(n, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def torchmetrics():
    return pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: pip install 'negengine[evaluate]'")


@pytest.fixture
def torch_fidelity():
    return pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed: pip install 'negengine[evaluate]'")


@pytest.mark.usefixtures("torchmetrics")
def test_frechet_distance_of_two_normal_sets():
    x, y = normal(40, 5, 0), normal(60, 5, 1, shift=0.5, scale=1.5)
    a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert metrics.frechet_distance(x, y).item() == pytest.approx(expected, abs=1e-6)
    assert metrics.frechet_distance(x, x).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.usefixtures("torchmetrics")
def test_kernel_distance_is_the_unbiased_estimate():
    x, y = normal(12, 4, 0), normal(12, 4, 1, shift=0.3)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal(k):
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    expected = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()
    assert metrics.kernel_distance(x, y).item() == pytest.approx(expected.item(), abs=1e-9)
    more = normal(30, 4, 2)
    state = torch.get_rng_state()
    assert metrics.kernel_distance(x, more) == metrics.kernel_distance(x, more) != metrics.kernel_distance(x, more, seed=1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.usefixtures("torchmetrics")
def test_inception_score_is_the_exponential_of_mutual_information():
    logits = normal(30, 7, 0, scale=2)
    p = logits.softmax(-1)
    expected = (p * (p.log() - p.mean(0).log())).sum(-1).mean().exp()
    assert metrics.inception_score(logits).item() == pytest.approx(expected.item(), abs=1e-9)
    assert metrics.inception_score(1000 * torch.eye(7)).item() == pytest.approx(7, abs=1e-6)


@pytest.mark.usefixtures("torch_fidelity")
def test_precision_and_recall_ball_by_ball():
    x, y = normal(15, 3, 0, shift=0.5), normal(20, 3, 1)

    def near(points, others):
        radii = [sorted((o - p).norm().item() for p in others)[3] for o in others]
        return np.mean([any((p - o).norm().item() <= radius for o, radius in zip(others, radii, strict=True)) for p in points])

    found = metrics.precision_recall(x, y)
    assert [value.item() for value in found] == pytest.approx([near(x, y), near(y, x)])
    assert [value.item() for value in metrics.precision_recall(y, y)] == [1, 1]


def test_torch_fidelity_is_new_enough_to_take_the_images_first():
    """Before 0.4.0 the reference came first: precision and recall would be exchanged without a word."""
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    named = re.findall(r'"torch-fidelity([^"]*)"', project)
    assert named
    assert set(named) == {">=0.4"}


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("torchmetrics", lambda: metrics.frechet_distance(normal(4, 2, 0), normal(4, 2, 1))),
        ("torchmetrics", lambda: metrics.kernel_distance(normal(4, 2, 0), normal(4, 2, 1))),
        ("torchmetrics", lambda: metrics.inception_score(normal(4, 2, 0))),
        ("torch_fidelity", lambda: metrics.precision_recall(normal(4, 2, 0), normal(4, 2, 1))),
    ],
)
def test_a_missing_library_says_how_to_install_it(monkeypatch, package, call):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package.replace('_', '-')}: pip install 'negengine\[evaluate\]'"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.frechet_distance(torch.ones(1, 2), torch.ones(4, 2)), "at least 2"),
        (lambda: metrics.frechet_distance(torch.ones(4, 2), torch.ones(4, 3)), "2 columns and those of the reference 3"),
        (lambda: metrics.kernel_distance(torch.full((4, 2), float("nan")), torch.ones(4, 2)), "NaN"),
        (lambda: metrics.inception_score(torch.ones(2, 3), splits=3), "at least 3"),
        (lambda: metrics.precision_recall(torch.ones(3, 2), torch.ones(9, 2)), "at least 4"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
