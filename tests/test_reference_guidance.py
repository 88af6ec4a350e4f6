"""The oracle of guidance against the rules written a second way: Python floats, one element at a time."""

import math

import pytest
import torch

from negengine.reference import guidance

ALPHA_BAR, BEFORE = 0.37, 0.52


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, torch.tensor(b, dtype=torch.float64).view_as(a), rtol=1e-12, atol=1e-12)


def predictions(guided, both, c, n, u, g):
    """The rule of the CFG of a base and of a negative prediction, of one element."""
    base = (1 - g) * u + g * c if guided else c
    return base, (1 - g) * u + g * n if guided and both else n


@pytest.mark.parametrize("guided,both", [(False, False), (True, False), (True, True)])
def test_guide(guided, both):
    """``e_hat = (1 + lambda) e - lambda e_neg``, the guided noise."""
    c, n, u = (randn(2, 3, seed=seed) for seed in range(3))
    strength, g = torch.tensor([0.3, 2.0], dtype=torch.float64), 7.5
    extra = (u, torch.tensor([g], dtype=torch.float64), both) if guided else ()
    expected = []
    for i in range(2):
        for k in range(3):
            e, m = predictions(guided, both, c[i, k].item(), n[i, k].item(), u[i, k].item(), g)
            expected.append((1 + strength[i].item()) * e - strength[i].item() * m)
    close(guidance.guide(c, n, strength, *extra), expected)
    close(guidance.guide(c, n, strength, *extra, copies=2) if extra else guidance.guide(c, n, strength, copies=2), expected * 2)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_evidence_and_distances(clip):
    """The posterior mean of DDPM, equation 7 of arXiv 2006.11239, and squared distances to it."""
    x, y, c, n = (randn(2, 5, seed=seed) for seed in range(4))
    a = ALPHA_BAR / BEFORE
    expected = [[0.0, 0.0], [0.0, 0.0]]
    for i in range(2):
        for k in range(5):
            for row, eps in enumerate((n[i, k].item(), c[i, k].item())):
                x0 = (x[i, k].item() - math.sqrt(1 - ALPHA_BAR) * eps) / math.sqrt(ALPHA_BAR)
                x0 = x0 if clip is None else min(max(x0, -clip), clip)
                mean = math.sqrt(BEFORE) * (1 - a) * x0 + math.sqrt(a) * (1 - BEFORE) * x[i, k].item()
                expected[row][i] += (y[i, k].item() - mean / (1 - ALPHA_BAR)) ** 2
    means = torch.tensor(guidance.means_of(ALPHA_BAR, BEFORE), dtype=torch.float64)
    close(guidance.distances(x, y, c, n, means, clip=clip), expected)
    close(guidance.evidence(x, y, c, n, means, clip=clip), [a - b for a, b in zip(*expected, strict=True)])


def test_evidence_speaks_for_the_prediction_that_the_step_followed():
    x, c, n = (randn(2, 50, seed=seed) for seed in range(3))
    means = torch.tensor(guidance.means_of(ALPHA_BAR, BEFORE), dtype=torch.float64)
    for followed, sign in ((c, 1), (n, -1)):
        y = means[2] * guidance.clean(x, followed, means) + means[3] * x
        assert (sign * guidance.evidence(x, y, c, n, means) > 0).all()


@pytest.mark.parametrize("tau", [0.0, 0.9, 2.5])
def test_nag(tau):
    z, away = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    scale, alpha = 5.0, 0.25
    expected = []
    for b in range(2):
        for t in range(3):
            p, q = z[b, t].tolist(), away[b, t].tolist()
            g = [scale * v - (scale - 1) * w for v, w in zip(p, q, strict=True)]
            ratio = sum(map(abs, g)) / sum(map(abs, p))
            expected += [alpha * v * min(ratio, tau) / ratio + (1 - alpha) * w for v, w in zip(g, p, strict=True)]
    close(guidance.nag(z, away, scale, tau, alpha), expected)


def test_nag_of_nothing_is_nothing():
    z = torch.zeros(1, 2, 3)
    assert torch.equal(guidance.nag(z, z, 5, 2.5, 0.25), z)
