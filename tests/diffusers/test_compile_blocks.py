"""Denoisers compiled block by block, and denoisers that no pipeline drives.

Blocks alike share compiled code: it has to merge in those that have a hook, and only there, each counting for itself.
"""

import pytest
import torch
from tiny import BUILDERS, denoiser, draw

import negengine

SETTINGS = {"timesteps": (0, 1000), "threshold": 0.85, "min_grid": 1}
SDXL = pytest.param("sdxl", marks=pytest.mark.exhaustive)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["whole", "by blocks"])
@pytest.mark.parametrize("family", ["flux", SDXL])
def test_a_bare_denoiser_equals_the_eager_one(family, how):
    pipe = BUILDERS[family]()
    model, settings = denoiser(pipe), negengine.NegToMe(**SETTINGS, group_size=2)
    negengine.apply(model, settings)
    expected, share = draw(pipe), negengine.status(model)[negengine.NegToMe].merged_share
    negengine.remove(model)
    assert not torch.equal(draw(pipe), expected)
    if how == "whole":
        model.compile(backend="eager", fullgraph=True)
    else:
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    negengine.apply(model, settings)
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-4)
    assert negengine.status(model)[negengine.NegToMe].merged_share == share


@pytest.mark.parametrize("dropout", [0, pytest.param(0.3, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("blocks", [pytest.param(None, marks=pytest.mark.exhaustive), (r"up_blocks.1",)])
def test_sdxl_by_blocks(blocks, dropout):
    """Of its blocks, all of one class, some have hooks; they are called with tokens of two numbers."""
    pipe, settings = BUILDERS["sdxl"](), negengine.NegToMe(**SETTINGS, blocks=blocks, dropout=dropout)
    negengine.apply(pipe, settings)
    expected, status = draw(pipe), negengine.status(pipe)[negengine.NegToMe]
    assert 0 < status.merged_tokens < status.eligible_tokens
    graphs = []
    denoiser(pipe).compile_repeated_blocks(backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-4)
    found = negengine.status(pipe)[negengine.NegToMe]
    assert (found.merged_tokens, found.eligible_tokens) == (status.merged_tokens, status.eligible_tokens)
    assert found.active_blocks == status.active_blocks
    assert len(graphs) <= 4


def many_blocks():
    """FLUX, with 3 joint and 5 single blocks."""
    from diffusers import FluxTransformer2DModel

    pipe = BUILDERS["flux"]()
    torch.manual_seed(0)
    pipe.transformer = FluxTransformer2DModel(**pipe.transformer.config | {"num_layers": 3, "num_single_layers": 5}).eval()
    return pipe


@pytest.mark.parametrize("method", ["NegToMe", pytest.param("NAG", marks=pytest.mark.exhaustive)])
def test_as_many_graphs_as_without(method):
    """However many blocks there are. NAG changes the number of rows: torch then lets it vary, and makes one graph more, for the
    first block, whose input is a view with a guard of its own."""
    pipe = many_blocks()
    nag = negengine.NormalizedAttentionGuidance(negative_prompt="a cat", timesteps=(0, 1000))
    settings = negengine.NegToMe(**SETTINGS) if method == "NegToMe" else nag
    negengine.apply(pipe, settings)
    expected = draw(pipe)
    negengine.remove(pipe)
    graphs = []
    pipe.transformer.compile_repeated_blocks(backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    plain = draw(pipe)
    without = len(graphs)
    assert not torch.equal(plain, expected)
    negengine.apply(pipe, settings)
    graphs.clear()
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-4)
    assert 0 < len(graphs) <= without + (method == "NAG")
    negengine.remove(pipe)
    torch.testing.assert_close(draw(pipe), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("window", [(0, 500), (500, 1000)], ids=["late", "early"])
def test_steps_of_another_kind_need_a_graph_of_each_kind_of_block(window):
    """Torch compiles the single blocks twice in the first step, as the first of them gets tensors of another layout."""
    pipe, settings = many_blocks(), negengine.NegToMe(**SETTINGS | {"timesteps": window})
    negengine.apply(pipe, settings)
    expected, steps = draw(pipe), negengine.status(pipe).active_steps
    assert 0 < steps < 3
    negengine.remove(pipe)
    graphs = []
    pipe.transformer.compile_repeated_blocks(backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    draw(pipe)
    without = len(graphs)
    negengine.apply(pipe, settings)
    graphs.clear()
    for _ in range(2):
        torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-4)
    assert without < len(graphs) <= without + 2
