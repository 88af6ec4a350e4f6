"""Labels: entropy, number, shares and divergence against scipy and by their properties."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from negengine import metrics

CLASSES = 6
some = st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=40).map(lambda labels: torch.tensor(labels, dtype=torch.int64))


def smoothed(labels, without, prior=0.5):
    counts = np.bincount(labels.numpy(), minlength=CLASSES) + prior
    return np.delete(counts, [] if without is None else without)


@given(some)
def test_entropy_and_number_of_labels(labels):
    counts = np.unique(labels.numpy(), return_counts=True)[1]
    assert metrics.label_entropy(labels).item() == pytest.approx(stats.entropy(counts, base=2), abs=1e-12)
    assert metrics.distinct_labels(labels).item() == len(counts)


@given(some, some, st.none() | st.integers(0, CLASSES - 1))
def test_divergence_of_smoothed_counts(labels, base, without):
    expected = stats.entropy(smoothed(labels, without), smoothed(base, without), base=2)
    assert metrics.label_divergence(labels, base, CLASSES, without).item() == pytest.approx(expected, abs=1e-12)
    assert metrics.label_divergence(base, base, CLASSES, without).item() == 0


@given(some, st.integers(0, CLASSES - 1))
def test_what_is_left_out_changes_no_divergence(labels, without):
    more = torch.cat([labels, torch.full((9,), without)])
    other = torch.arange(CLASSES)
    found = [metrics.label_divergence(x, other, CLASSES, without).item() for x in (labels, more)]
    assert found[0] == pytest.approx(found[1], abs=1e-12)


def test_shares_without_a_class():
    labels = torch.tensor([0, 0, 1, 3])
    assert metrics.label_shares(labels, 4).tolist() == [0.5, 0.25, 0, 0.25]
    assert metrics.label_shares(labels, 4, without=0).tolist() == [0, 0.5, 0, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.label_entropy(torch.tensor([])), "int64"),
        (lambda: metrics.label_entropy(torch.tensor([-1])), "0 …"),
        (lambda: metrics.label_shares(torch.tensor([4]), 4), "0 … 3"),
        (lambda: metrics.label_shares(torch.tensor([2]), 4, without=2), "no label is left"),
        (lambda: metrics.label_divergence(torch.tensor([0]), torch.tensor([0]), 1, without=0), "no class is left"),
        (lambda: metrics.label_divergence(torch.tensor([0]), torch.tensor([0]), 2, prior=0), "prior"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
