"""The ways in which users compile, on FLUX's and SDXL's own classes and block types, narrow and shallow."""

import dataclasses
import functools

import pytest
import torch
from test_compile import Counting, fresh  # noqa: F401
from tiny import denoiser, draw, flux, sdxl

import negengine
from negengine.bench.architectures import SDXL_BASE

SETTINGS = {"timesteps": (500, 1000), "threshold": 0.85, "min_grid": 1}
# as published but for widths, heads and depth: tracing takes time, numbers do not
LEVELS = {name: SDXL_BASE[name] for name in ("down_block_types", "up_block_types", "layers_per_block")}
BUILDERS = {
    "flux": functools.partial(flux, num_layers=1, num_single_layers=1),
    "sdxl": functools.partial(
        sdxl, **LEVELS, block_out_channels=(32, 32, 32), transformer_layers_per_block=(1, 1, 1), attention_head_dim=(1, 1, 1)
    ),
}
WAYS = {
    "fullgraph": lambda model, backend: model.compile(backend=backend, fullgraph=True),
    "repeated blocks": lambda model, backend: model.compile_repeated_blocks(backend=backend, fullgraph=True),
    "dynamic": lambda model, backend: model.compile(backend=backend, fullgraph=True, dynamic=True),
}
INDUCTOR = {
    "fullgraph": lambda model: model.compile(fullgraph=True),
    "repeated blocks": lambda model: model.compile_repeated_blocks(fullgraph=True),
    "reduce-overhead": lambda model: model.compile(mode="reduce-overhead", fullgraph=True),
    "dynamic": lambda model: model.compile(fullgraph=True, dynamic=True),
}
GRAPHS = {  # active and inactive, of a model or of each of its kinds of block
    ("flux", "fullgraph"): 2,
    ("flux", "repeated blocks"): 4,
    ("flux", "dynamic"): 2,
    ("sdxl", "fullgraph"): 2,
    ("sdxl", "dynamic"): 2,
}
CASES = [
    pytest.param(*case, marks=() if case == ("flux", "repeated blocks") else pytest.mark.exhaustive, id=" ".join(case))
    for case in GRAPHS
]


@pytest.mark.parametrize("family,way", CASES)
def test_other_values_find_their_graphs(family, way):
    """Prompts, seed, steps, alpha, threshold, and window recompile nothing."""
    pipe, eager, backend = BUILDERS[family](), BUILDERS[family](), Counting()
    settings = negengine.NegToMe(**SETTINGS)
    WAYS[way](denoiser(pipe), backend)
    for changes, call in (
        ({}, {}),
        ({"alpha": 0.3}, {"seed": 5}),
        ({"threshold": 0.5}, {"num_inference_steps": 5}),
        ({"timesteps": (200, 900)}, {}),
        ({"alpha": (0.1, 0.7)}, {"seed": 7}),
    ):
        changed = dataclasses.replace(settings, **changes)
        negengine.apply(pipe, changed), negengine.apply(eager, changed)
        torch.testing.assert_close(draw(pipe, **call), draw(eager, **call), rtol=1e-4, atol=1e-4)
        assert backend.graphs == GRAPHS[family, way], (changes, call)
    assert 0 < negengine.status(pipe)[negengine.NegToMe].active_steps < 3


@pytest.mark.parametrize(
    "way", [*(pytest.param(way, marks=pytest.mark.exhaustive) for way in ("fullgraph", "dynamic")), "repeated blocks"]
)
def test_other_batches_and_resolutions_find_their_graphs(way):
    """Of the second batch and of the second resolution torch makes graphs in which they may vary; those serve every further one."""
    pipe, eager, backend = BUILDERS["flux"](), BUILDERS["flux"](), Counting()
    WAYS[way](denoiser(pipe), backend)
    for each in (pipe, eager):
        negengine.apply(each, negengine.NegToMe(**SETTINGS))
    once, made = GRAPHS["flux", way], []
    batches = [{"n": images} for images in (2, 3, 4, 6, 5)]
    resolutions = [{"height": 16 * rows, "width": 16 * columns} for rows, columns in ((5, 6), (8, 4), (3, 9))]
    for call in batches + resolutions:
        torch.testing.assert_close(draw(pipe, **call), draw(eager, **call), rtol=1e-4, atol=1e-4)
        made.append(backend.graphs // once)
    assert made == [1] * 8 if way == "dynamic" else made == [1, 2, 2, 2, 2, 3, 3, 3]


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", INDUCTOR)
def test_inductor(way):
    """On a CPU ``reduce-overhead`` is inductor without CUDA graphs."""
    pipe, eager = BUILDERS["flux"](), BUILDERS["flux"]()
    INDUCTOR[way](denoiser(pipe))
    for each in (pipe, eager):
        negengine.apply(each, negengine.NegToMe(**SETTINGS))
    for seed in (2, 5):
        torch.testing.assert_close(draw(pipe, seed=seed), draw(eager, seed=seed), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_cuda_graphs(family):
    pipe, eager = BUILDERS[family]().to("cuda"), BUILDERS[family]().to("cuda")
    denoiser(pipe).compile(mode="reduce-overhead", fullgraph=True)
    for each in (pipe, eager):
        negengine.apply(each, negengine.NegToMe(**SETTINGS))
    for seed in (2, 5, 2):  # warm-up, recording, replay
        torch.testing.assert_close(draw(pipe, seed=seed).cpu(), draw(eager, seed=seed).cpu(), rtol=1e-3, atol=1e-3)
