"""Normalized attention guidance on one pipeline, the second attention written out in literal_nag.py on its twin."""

from __future__ import annotations

from literal_nag import LiteralNag, encoded
from tiny import draw, kind

import negengine
from negengine import NegToMe, NormalizedAttentionGuidance

AVOIDED = ("trees", "a brick wall")  # one per prompt
SETTINGS = {"scale": 4.0, "tau": 2.0, "alpha": 0.6}  # much stronger than the defaults
TAU = {"flux": 2.0, "sdxl": 3.5, "sd": 3.5}  # shortens some tokens and not others
MERGE = {"threshold": -1, "timesteps": (0, 1000), "min_grid": 1}


def guide(pipe, negative_prompt=AVOIDED, **settings):
    return negengine.apply(pipe, NormalizedAttentionGuidance(negative_prompt=negative_prompt, **{**SETTINGS, **settings}))


def report(pipe):
    return negengine.status(pipe)[NormalizedAttentionGuidance]


def assert_same(builder, call=draw, n=2, length=11, texts=AVOIDED, negtome=None, order=(0, 1), **settings):
    """Both ways give the same latents, but for rounding far below what guidance did to them. Returns the guided pipeline."""
    ours, theirs = builder(), builder()
    settings = {**SETTINGS, "tau": TAU[kind(ours)], **settings}
    window = {"window": settings["timesteps"]} if "timesteps" in settings else {}
    others = {name: value for name, value in settings.items() if name != "timesteps"}
    literal = LiteralNag(theirs, encoded(theirs, list(texts), n, length), n, **others, **window, negtome=negtome)
    for seed in range(20):  # until no match of NegToMe hangs on rounding
        literal.reset()
        expected = call(theirs, seed=seed)
        if literal.margin > 3e-5 or negtome is None:
            break
    else:
        raise AssertionError("every seed hangs on the rounding of a cosine")
    assert 0 < literal.clamped < literal.tokens
    methods = [NormalizedAttentionGuidance(negative_prompt=texts, **settings)]
    if negtome is not None:
        methods.append(NegToMe(**MERGE, **negtome))
    alone = call(negengine.apply(ours, methods[-1]), seed=seed) if negtome is not None else call(ours, seed=seed)
    negengine.remove(ours)
    for i in order[: len(methods)]:
        negengine.apply(ours, methods[i])
    got = call(ours, seed=seed)
    assert_close(got, expected, alone)
    return ours


def assert_close(got, expected, without):
    effect = (expected - without).abs().max()
    assert effect > 1e-2
    assert (got - expected).abs().max() < 2e-4 * effect
