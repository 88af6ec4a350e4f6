"""Safe latent diffusion: loops over elements in float64, written from the two published rules, against the operator."""

import numpy as np
import pytest
import torch

from negengine.methods import SafeLatentDiffusion
from negengine.ops.safety import sld

SHAPE = (2, 3, 4, 5)
PRESETS = list(SafeLatentDiffusion.presets)


def predictions(seed, dtype=torch.float64, count=3):
    """Predictions that differ by about a threshold, so that each branch of the rule is taken by many elements."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    near = [first + 0.03 * torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count - 1)]
    return [x.to(dtype) for x in (first, *near)]


def settings_of(preset):
    s = SafeLatentDiffusion.preset(preset)
    return {name: getattr(s, name) for name in ("scale", "threshold", "momentum_scale", "momentum", "variant", "outer")}


def literal(e0, ep, es, nu, scale, threshold, momentum_scale, momentum, variant, outer):
    """One element."""
    difference = ep - es
    mu = 0.0 if difference >= threshold else min(abs(difference) * scale, 1.0)
    g = mu * (es - (e0 if variant == "paper" else ep)) + momentum_scale * nu
    return outer * g, momentum * nu + (1 - momentum) * g


def literally(e0, ep, es, nu, **settings):
    results = [literal(*map(float, x), **settings) for x in zip(*(t.double().flatten() for t in (e0, ep, es, nu)), strict=True)]
    return [torch.tensor(np.array(r)).reshape(SHAPE) for r in zip(*results, strict=True)]


@pytest.mark.parametrize("outer", [1.0, 2.5])
@pytest.mark.parametrize("preset", PRESETS)
def test_steps_against_the_literal_rule(preset, outer):
    settings = settings_of(preset) | {"outer": outer}
    nu, expected_nu = None, torch.zeros(SHAPE, dtype=torch.float64)
    for step in range(4):
        e0, ep, es = predictions(step)
        term, nu = sld(e0, ep, es, nu, **settings)
        expected, expected_nu = literally(e0, ep, es, expected_nu, **settings)
        torch.testing.assert_close(term, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(nu, expected_nu, rtol=1e-12, atol=1e-14)
        assert term.count_nonzero() > 10


def test_the_threshold_is_signed_and_left_out_itself():
    ep = torch.tensor([0.5, 0.25, 0.0, -8.0], dtype=torch.float64)
    zero = torch.zeros_like(ep)
    term, _ = sld(zero - 1, ep, zero, None, scale=0.125, threshold=0.25, momentum_scale=0, momentum=0)
    assert term.tolist() == [0, 0, 0, 1]  # at and above the threshold: none; far below: the direction, 0 - (-1), in full


def test_what_dng_does_not_read():
    e0, e, es = predictions(0)
    with_it, without = sld(e0, e, es, None, **settings_of("dng")), sld(None, e, es, None, **settings_of("dng"))
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


@pytest.mark.parametrize("preset", ["medium", "dng"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_inputs_are_computed_in_float32(dtype, preset):
    """The result is that of the same values in float32, to the bit."""
    half = predictions(0, dtype)
    nu = predictions(1, dtype)[0]
    found = sld(*half, nu, **settings_of(preset))
    expected = sld(*(x.float() for x in half), nu.float(), **settings_of(preset))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_inputs_are_left_alone():
    inputs = [*predictions(0), torch.randn(SHAPE, dtype=torch.float64)]
    before = [x.clone() for x in inputs]
    sld(*inputs, **settings_of("strong"))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"variant": "release"}, r"variant must be one of \('paper', 'dng'\), got 'release'"),
        ({"unconditional": None}, "variant='paper' needs the unconditional prediction; variant='dng' does without"),
        ({"unconditional": torch.zeros(1)}, r"unconditional has the shape \[1\], conditional \[2, 3, 4, 5\]"),
        ({"negative": torch.zeros(3, 4, 5)}, r"negative has the shape \[3, 4, 5\]"),
        ({"nu": torch.zeros(1)}, r"nu has the shape \[1\]"),
    ],
)
def test_inputs_that_cannot_work(changes, message):
    e0, ep, es = predictions(0)
    inputs = {"unconditional": e0, "conditional": ep, "negative": es, "nu": None} | settings_of("weak") | changes
    with pytest.raises(ValueError, match=message):
        sld(**inputs)
