"""Each metric against its definition and against an independent computation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from negengine import metrics

sizes = st.tuples(st.integers(2, 9), st.integers(1, 12), st.integers(0, 10**6))


def features(n, f, seed):
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 9), st.floats(0.1, 5))
def test_vendi_of_copies_is_one(n, scale):
    row = features(1, 5, 0) * scale
    assert metrics.vendi_score(row.expand(n, 5)).item() == pytest.approx(1, abs=1e-9)


@given(st.integers(1, 9))
def test_vendi_of_orthogonal_images_is_their_number(n):
    assert metrics.vendi_score(3 * torch.eye(n, 9)).item() == pytest.approx(n, abs=1e-9)


def test_vendi_of_two_images_in_closed_form():
    # eigenvalues of the 2 x 2 kernel are (1 +- c) / 2
    c = 0.28
    x = torch.tensor([[1.0, 0.0], [c, math.sqrt(1 - c * c)]], dtype=torch.float64)
    p = [(1 + c) / 2, (1 - c) / 2]
    assert metrics.vendi_score(x).item() == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), abs=1e-12)


@given(sizes)
@settings(deadline=None)
def test_vendi_equals_the_spectrum_of_the_features(size):
    """The kernel's nonzero eigenvalues are the squared singular values of the unit rows, over N."""
    x = features(*size)
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    p = np.linalg.svd(unit, compute_uv=False) ** 2 / len(unit)
    p = p[p > 1e-15]
    assert metrics.vendi_score(x).item() == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), abs=1e-6)


@given(sizes)
@settings(deadline=None)
def test_diversity_knows_no_order_and_no_scale(size):
    x = features(*size)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(size[2]))
    for metric in (metrics.vendi_score, metrics.pairwise_distance):
        assert metric(x[order] * 7).item() == pytest.approx(metric(x).item(), abs=1e-6)


@given(sizes)
@settings(deadline=None)
def test_pairwise_distance_pair_by_pair(size):
    x = features(*size).tolist()
    total, pairs = 0.0, 0
    for i in range(len(x)):
        for j in range(i):
            dot = sum(a * b for a, b in zip(x[i], x[j], strict=True))
            total += 1 - dot / math.hypot(*x[i]) / math.hypot(*x[j])
            pairs += 1
    assert metrics.pairwise_distance(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(total / pairs, abs=1e-9)


def test_feature_similarity():
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0]])
    expected = [1, 0, -1, math.sqrt(0.5)]
    assert metrics.feature_similarity(x, torch.tensor([[5.0, 0.0]])).tolist() == pytest.approx(expected)


def test_pixel_correlation_against_numpy():
    images, target = torch.rand(3, 2, 4, 5), torch.rand(1, 2, 4, 5)
    expected = [np.corrcoef(i.flatten().double().numpy(), target.flatten().double().numpy())[0, 1] for i in images]
    assert metrics.pixel_correlation(images, target).tolist() == pytest.approx(expected)
    assert metrics.pixel_correlation(torch.ones_like(images), target).tolist() == [0, 0, 0]


def test_fidelity_and_entropy():
    logits = torch.eye(10)[[3, 3, 4, 9]]
    assert metrics.fidelity(logits, torch.tensor([3, 0, 4, 9])).item() == 0.75
    assert metrics.class_entropy(logits).item() == pytest.approx(1.5)
    assert metrics.class_entropy(torch.eye(8)).item() == pytest.approx(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.vendi_score(torch.ones(3)), r"\[N, F\]"),
        (lambda: metrics.vendi_score(torch.ones(0, 3)), "0 rows"),
        (lambda: metrics.vendi_score(torch.tensor([[float("nan")]])), "NaN"),
        (lambda: metrics.pairwise_distance(torch.ones(1, 3)), "at least 2"),
        (lambda: metrics.feature_similarity(torch.ones(2, 3), torch.ones(2, 3)), r"\[1, 3\]"),
        (lambda: metrics.pixel_correlation(torch.ones(2, 3, 4, 4), torch.ones(1, 3, 4, 5)), "target"),
        (lambda: metrics.fidelity(torch.ones(2, 3), torch.zeros(3, dtype=torch.int64)), r"\[2\]"),
        (lambda: metrics.fidelity(torch.ones(2, 3), torch.tensor([0, 3])), "0 … 2"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
