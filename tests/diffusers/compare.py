"""The two ways to the same picture: negengine on one pipeline, the literal processors on its twin."""

from __future__ import annotations

import torch
from literal import Literal
from tiny import kind
from tiny_more import BUILDERS
from tiny_z_image import OWN

import negengine

THRESHOLD = 0.85  # some tokens of the tiny models exceed it, some do not
HALVES = ("sd", "sdxl", "sd3", "z_image")  # classifier-free guidance in one batch
ROUNDING = 3e-7  # of a float32 cosine


def hooked(pipe, call, **settings):
    """Latents with NegToMe, and the status after the run."""
    negengine.apply(pipe, negengine.NegToMe(**{"threshold": THRESHOLD, "min_grid": 1, **settings}))
    return call(pipe), negengine.status(pipe)[negengine.NegToMe]


def literal(pipe, call, n, timesteps=(0, 1000), reference="first", guided=True, **settings):
    """Latents with the test's processors, and the seed of the run.

    Bits can be compared only where no decision hangs on the rounding of a cosine: the first seed of which that
    holds is taken.
    """
    if kind(pipe) in ("sd", "sdxl"):
        settings = {"blocks": ("up_blocks",), **settings}
    if kind(pipe) in HALVES:
        settings = {"halves": 2 if guided else 1, **settings}
    listener = Literal(pipe, n, window=timesteps, mode=reference, **{"threshold": THRESHOLD, **settings})
    for seed in range(20):
        listener.margin, listener.calls = 1.0, 0
        result = call(pipe, seed=seed)
        assert listener.calls
        if listener.margin > ROUNDING:
            return result, seed
    raise AssertionError("every seed hangs on the rounding of a cosine")


def assert_same(builder, call, n, guided=True, prepare=lambda pipe: None, **settings):
    """Both ways give the same bits; some tokens are merged and some are not. Returns the status.

    ``call(pipe, seed=...)`` draws. ``prepare(pipe)`` is done to both pipelines.
    """
    settings = {"timesteps": (0, 1000), **settings}
    build = OWN[builder] if builder in OWN else BUILDERS[builder]
    ours, theirs = build(), build()
    prepare(ours), prepare(theirs)
    expected, seed = literal(theirs, call, n, guided=guided, **settings)
    plain = call(ours, seed=seed)
    got, status = hooked(ours, lambda pipe: call(pipe, seed=seed), **settings)
    assert 0 < status.merged_tokens < status.eligible_tokens
    assert not torch.equal(got, plain)
    assert torch.equal(got, expected)
    return status
