"""CADS and seed variance: numpy in float64, row by row, written from the published rules, against the operators."""

import numpy as np
import pytest
import torch

from negengine.ops.conditioning import cads, cads_gamma, seed_variance

SHAPES = [(2, 5, 8), (3, 16)]


def embedding(shape, seed=0, dtype=torch.float64):
    """Rows of different mean and deviation, so that statistics over the wrong elements show."""
    c = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    row = torch.arange(1, shape[0] + 1, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    return (c * row + 3 * row).to(dtype)


def normal(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(shape, seed=2):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal_cads(c, gamma, scale, psi, noise):
    result = []
    for row, n in zip(c.double().numpy(), noise.double().numpy(), strict=True):
        y = np.sqrt(gamma) * row + scale * np.sqrt(1 - gamma) * n
        rescaled = (y - y.mean()) / y.std(ddof=1) * row.std(ddof=1) + row.mean()
        result.append(psi * rescaled + (1 - psi) * y)
    return torch.tensor(np.array(result))


@pytest.mark.parametrize(
    "t,gamma",
    [(1.0, 0), (0.9, 0), (0.75, 0.5), (0.8, 1 / 3), (0.6, 1), (0.3, 1), (0.0, 1)],
)
def test_gamma(t, gamma):
    assert cads_gamma(t, 0.6, 0.9) == pytest.approx(gamma, abs=1e-12)
    assert 0 <= cads_gamma(t, 0.6, 0.9) <= 1


def test_gamma_is_exact_at_its_ends():
    """So that the embedding is untouched, to the bit, once it is clean."""
    for tau1, tau2 in ((0.6, 0.9), (0.1, 0.3), (0.0, 0.7), (0.3, 1.0)):
        assert (cads_gamma(tau1, tau1, tau2), cads_gamma(tau2, tau1, tau2)) == (1.0, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("psi", [0.0, 0.4, 1.0])
def test_cads_against_the_literal_rule(shape, gamma, psi):
    c, noise = embedding(shape), normal(shape)
    torch.testing.assert_close(cads(c, gamma, 0.25, psi, noise), literal_cads(c, gamma, 0.25, psi, noise), rtol=1e-12, atol=1e-12)


def test_cads_keeps_mean_and_deviation():
    c = embedding((2, 5, 8))
    y = cads(c, 0.2, 0.25, 1.0, normal(c.shape))
    for a, b in zip(y, c, strict=True):
        assert (a.mean().item(), a.std().item()) == pytest.approx((b.mean().item(), b.std().item()), rel=1e-9)
    assert not torch.allclose(y, c, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_clean_embedding_is_untouched(dtype):
    c = embedding((2, 5, 8), dtype=dtype)
    assert torch.equal(cads(c, 1.0, 0.25, 1.0, normal(c.shape)), c)


def test_an_embedding_without_deviation():
    """Embeddings that are zero (SDXL's empty negative prompt) stay zero; without noise there is nothing to rescale."""
    zero = torch.zeros(2, 5, 8)
    assert torch.equal(cads(zero, 0.5, 0.25, 1.0, normal(zero.shape)), zero)
    assert torch.equal(cads(zero + 1, 0.25, 0.0, 1.0, normal(zero.shape)), zero + 0.5)


def literal_seed_variance(c, share, strength, noise, choice, relative):
    result = c.double().numpy().copy()
    for b, row in enumerate(c.double().numpy()):
        tokens = row.reshape(-1, row.shape[-1])
        used = [t for t, token in enumerate(tokens) if (token != 0).any()]
        width = strength * (tokens[used].std(ddof=1) if relative else 1)
        for t in used:
            for d in range(tokens.shape[1]):
                at = (b, d) if c.ndim == 2 else (b, t, d)
                if float(choice[at]) < share:
                    result[at] += width * (2 * float(noise[at]) - 1)
    return torch.tensor(result)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_seed_variance_against_the_literal_rule(shape, share, relative):
    c, noise, choice = embedding(shape), uniform(shape), uniform(shape, 3)
    if c.ndim == 3:
        c[0, 3:] = 0  # padding
        c[1, 0, 2] = 0  # one zero does not make a token padding
    found = seed_variance(c, share, 2.0, noise, choice, relative=relative)
    expected = literal_seed_variance(c, share, 2.0, noise, choice, relative)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found != c).any() == (share > 0)


def test_seed_variance_in_share_and_width():
    c = torch.ones(1, 200, 200)
    added = seed_variance(c, 0.25, 3.0, uniform(c.shape), uniform(c.shape, 3)) - c
    assert (added != 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert -3 <= added.min() < -2.9
    assert 2.9 < added.max() <= 3
    assert added.mean().abs() < 0.02


def test_padding_stays_zero():
    c = embedding((2, 5, 8))
    c[:, 2] = 0
    assert not seed_variance(c, 1.0, 2.0, uniform(c.shape), uniform(c.shape, 3))[:, 2].any()
    assert torch.equal(seed_variance(0 * c, 1.0, 2.0, uniform(c.shape), uniform(c.shape), relative=True), 0 * c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    """One rounding, at the end: the result is that of the same values in float32, rounded."""
    c = embedding((2, 5, 8), dtype=dtype)
    noise, choice = uniform(c.shape).float(), uniform(c.shape, 3).float()
    for change in (
        lambda x: cads(x, 0.3, 0.25, 0.7, noise),
        lambda x: seed_variance(x, 0.5, 2.0, noise, choice),
        lambda x: seed_variance(x, 0.5, 2.0, noise, choice, relative=True),
    ):
        found = change(c)
        assert found.dtype == dtype
        assert torch.equal(found, change(c.float()).to(dtype))


def test_inputs_are_left_alone():
    inputs = embedding((2, 5, 8)), uniform((2, 5, 8)), uniform((2, 5, 8), 3)
    before = [x.clone() for x in inputs]
    cads(inputs[0], 0.3, 0.25, 0.7, inputs[1])
    seed_variance(inputs[0], 0.5, 2.0, *inputs[1:], relative=True)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_shapes_that_cannot_work(gamma):
    c = embedding((2, 5, 8))
    with pytest.raises(ValueError, match=r"noise has the shape \[1, 5, 8\], the embedding \[2, 5, 8\]; make them equal"):
        cads(c, gamma, 0.25, 1.0, c[:1])
    with pytest.raises(ValueError, match=r"noise has the shape \[1, 5, 8\]"):
        seed_variance(c, 0.5, 1.0, c[:1], c)
    with pytest.raises(ValueError, match=r"choice has the shape \[1, 5, 8\]"):
        seed_variance(c, 0.5, 1.0, c, c[:1])
    with pytest.raises(ValueError, match=r"the embedding must have the shape \[B, L, D\] or \[B, D\], got \[8\]"):
        cads(c[0, 0], gamma, 0.25, 1.0, c[0, 0])
