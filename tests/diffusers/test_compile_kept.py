"""What applying a method forgets of compiled code: once what cannot hear of hooks, never anything else."""

import functools
import weakref

import pytest
import torch
from test_compile import Counting, fresh  # noqa: F401
from tiny import denoiser, draw, flux

import negengine
from negengine.diffusers import compiled

SETTINGS = {"timesteps": (500, 1000), "threshold": 0.85, "min_grid": 1}
LIMITS = {"recompile_limit": 8, "accumulated_recompile_limit": 256}
small = functools.partial(flux, num_layers=1, num_single_layers=1)


@pytest.fixture(autouse=True)
def as_torch_has_it(monkeypatch):
    monkeypatch.setattr(compiled, "_blind", weakref.WeakSet())
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True, **LIMITS):
        yield


def by_blocks(backend):
    pipe = small()
    denoiser(pipe).compile_repeated_blocks(backend=backend, fullgraph=True)
    return pipe


def something(backend):
    """A compiled function that has nothing to do with us, called once."""

    def double(x, times=2):
        return x * times

    function = torch.compile(double, backend=backend, fullgraph=True, dynamic=False)
    function(torch.ones(2))
    return function


def test_the_first_apply_forgets_what_cannot_hear_of_hooks_and_no_other_does():
    backend, pipe = Counting(), small()
    function = something(backend)
    negengine.apply(pipe, negengine.NegToMe(**SETTINGS))
    function(torch.ones(2))
    assert backend.graphs == 1  # this denoiser is not compiled
    pipe = by_blocks("eager")
    negengine.apply(pipe, negengine.NegToMe(**SETTINGS))
    function(torch.ones(2))
    assert backend.graphs == 2
    for method in (negengine.SeedVariance(), negengine.NegToMe(**SETTINGS, blocks=("transformer_blocks",)), negengine.CADS()):
        negengine.apply(pipe, method)
        negengine.remove(pipe)
        negengine.apply(by_blocks("eager"), method)
    function(torch.ones(2))
    assert backend.graphs == 2


def test_nothing_is_forgotten_where_nothing_was_compiled_before(monkeypatch):
    monkeypatch.setattr(torch.compiler, "reset", lambda: pytest.fail("there is nothing to forget"))
    backend = Counting()
    negengine.apply(by_blocks("eager"), negengine.NegToMe(**SETTINGS))
    function = something(backend)
    negengine.apply(by_blocks("eager"), negengine.NegToMe(**SETTINGS))
    function(torch.ones(2))
    assert backend.graphs == 1


def test_what_somebody_else_has_forgotten_is_not_forgotten_once_more():
    something("eager")
    negengine.apply(small(), negengine.NegToMe(**SETTINGS))  # not compiled: that function is left alone
    held = [graph.guard_manager for graph in compiled._graphs()]  # by somebody, an exception for example
    torch.compiler.reset()
    backend = Counting()
    function, pipe = something(backend), by_blocks("eager")
    negengine.apply(pipe, negengine.NegToMe(**SETTINGS))
    function(torch.ones(2))
    assert backend.graphs == 1
    assert held


def test_methods_come_and_go_and_find_their_graphs():
    """Each set of methods has its own; another pipeline keeps those that it has."""
    ours, theirs, eager = Counting(), Counting(), small()
    settings = negengine.NegToMe(**SETTINGS)
    plain = draw(eager)
    expected = draw(negengine.apply(eager, settings))
    pipe, other = small(), small()
    for each, backend in ((pipe, ours), (other, theirs)):
        denoiser(each).single_transformer_blocks[0].compile(backend=backend, fullgraph=True)
    negengine.apply(other, settings)
    draw(other)
    for _ in range(2):
        torch.testing.assert_close(draw(pipe), plain, rtol=1e-4, atol=1e-4)
        negengine.apply(pipe, settings)
        torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-4)
        negengine.remove(pipe)
        draw(other)
    assert ours.graphs == 3  # without hooks, active, inactive
    assert theirs.graphs == 2


def graphs_of_one_function(number):
    function = something("eager")
    for times in range(3, 2 + number):
        function(torch.ones(2), times)


@pytest.mark.parametrize("there,limit", [(1, 9), (5, 13)])
def test_there_is_room_for_as_many_graphs_as_methods_need(there, limit):
    with torch._dynamo.config.patch(specialize_int=True):
        graphs_of_one_function(there)
        negengine.apply(by_blocks("eager"), negengine.NegToMe(**SETTINGS))  # forgets them
        graphs_of_one_function(there)
        for _ in range(3):
            negengine.apply(by_blocks("eager"), negengine.NegToMe(**SETTINGS))
    assert torch._dynamo.config.recompile_limit == limit


def test_more_graphs_than_torch_keeps_in_all_are_forgotten():
    with torch._dynamo.config.patch(specialize_int=True, accumulated_recompile_limit=11):
        negengine.apply(by_blocks("eager"), negengine.NegToMe(**SETTINGS))
        graphs_of_one_function(4)
        assert compiled.most_graphs() == 4
        negengine.apply(by_blocks("eager"), negengine.NegToMe(**SETTINGS))
        assert compiled.most_graphs() == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["whole", "by blocks"])
def test_a_dozen_sets_of_methods(how):
    """Torch gives up on the ninth graph of a function by default, and raises with ``fullgraph=True``."""
    eager, backend = small(), Counting()
    pipe = by_blocks(backend) if how == "by blocks" else small()
    if how == "whole":
        denoiser(pipe).compile(backend=backend, fullgraph=True)
    merge = functools.partial(negengine.NegToMe, **SETTINGS)
    nag = negengine.NormalizedAttentionGuidance(negative_prompt="the sea", timesteps=(500, 1000))
    variance = negengine.SeedVariance(timesteps=(500, 1000))
    sets = [
        (merge(),),
        (merge(reference="others"),),
        (merge(dropout=0.3),),
        (merge(blocks=("transformer_blocks",)),),
        (nag,),
        (merge(), nag),
        (variance,),
        (merge(), variance),
        (merge(reference="others"), nag),
        (merge(dropout=0.3), nag),
        (merge(blocks=("single_transformer_blocks",)),),
        (merge(blocks=("transformer_blocks",)), nag),
    ]
    for again in range(2):
        for methods in sets:
            negengine.apply(pipe, *methods), negengine.apply(eager, *methods)
            torch.testing.assert_close(draw(pipe), draw(eager), rtol=1e-3, atol=1e-3)
            negengine.remove(pipe), negengine.remove(eager)
        if not again:
            made = backend.graphs
    assert made > 8
    assert backend.graphs == made
