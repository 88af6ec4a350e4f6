"""Every method in every way in which users compile: the eager result, and no graph more for another seed."""

import functools

import pytest
import torch
from test_banks import GUIDED, record
from test_banks import SETTINGS as OF_BANKS
from test_compile import METHODS, SETTINGS, Counting, fresh  # noqa: F401
from test_compile_ways import INDUCTOR, WAYS
from tiny import denoiser, draw, flux, picture

import negengine
from negengine import NegToMe, NormalizedAttentionGuidance, ReferenceImage

small = functools.partial(flux, num_layers=1, num_single_layers=1)
FEATURES = {
    "pictures": lambda: NegToMe(**SETTINGS, reference=ReferenceImage(picture())),
    "dropout": lambda: NegToMe(**SETTINGS, dropout=0.3),
    "nag": lambda: NormalizedAttentionGuidance(negative_prompt="the sea", timesteps=(500, 1000)),
    **{name: functools.partial(METHODS.get, name) for name in METHODS},
}
# graphs of a kind of block: a hook of a few nodes joins rows, which is not counted
WITHOUT_INDUCTOR = ("repeated blocks", "dynamic")
CASES = [
    pytest.param(feature, way, marks=() if (feature, way) == ("nag", "repeated blocks") else pytest.mark.exhaustive)
    for feature in FEATURES
    for way in WITHOUT_INDUCTOR
]


def alike(pipe, eager, call, seed):
    torch.testing.assert_close(call(pipe, seed=seed), call(eager, seed=seed), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("feature,way", CASES)
def test_methods(feature, way):
    pipe, eager, backend = small(), small(), Counting(large=True)
    for each in (pipe, eager):
        negengine.apply(each, FEATURES[feature]())
    WAYS[way](denoiser(pipe), backend)
    alike(pipe, eager, draw, 2)
    made = backend.graphs
    assert 0 < made <= 4
    for seed in (5, 7):
        alike(pipe, eager, draw, seed)
    assert backend.graphs == made


@pytest.mark.exhaustive
@pytest.mark.parametrize("feature", FEATURES)
def test_methods_by_inductor(feature):
    """On a CPU ``reduce-overhead`` is inductor without CUDA graphs."""
    pipe, eager = small(), small()
    for each in (pipe, eager):
        negengine.apply(each, FEATURES[feature]())
    INDUCTOR["reduce-overhead"](denoiser(pipe))
    for seed in (2, 5):
        alike(pipe, eager, draw, seed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", [*WITHOUT_INDUCTOR, "reduce-overhead"])
def test_banks(way, tmp_path):
    pipe, eager = small(), small()
    settings, call = {**OF_BANKS, "timesteps": (0, 1000)}, {**GUIDED["flux"], "num_inference_steps": 4}
    bank = record(eager, tmp_path / "bank", settings=settings, **call)
    for each in (pipe, eager):
        negengine.apply(each, NegToMe(**settings, reference=bank))
    if way == "reduce-overhead":
        INDUCTOR[way](denoiser(pipe))
    else:
        WAYS[way](denoiser(pipe), "eager")
    for seed in (2, 5):
        alike(pipe, eager, functools.partial(draw, prompts=1, n=3, **call), seed)
    assert negengine.status(pipe)[NegToMe].active_steps == 4
