"""Copies of a pipeline that methods are applied to: they are pipelines of their own, without methods."""

import copy
import dataclasses
import functools
import gc
import pickle

import diffusers
import pytest
import torch
from tiny import BUILDERS, denoiser, draw, sdxl

import negengine
from negengine.diffusers.listen import MethodListener

SETTINGS = negengine.NegToMe(timesteps=(0, 1000), threshold=-1, min_grid=1)


@pytest.mark.parametrize("family", ["flux", "sdxl", "sd"])
def test_a_shallow_copy_with_a_scheduler_of_its_own(family):
    """As servers make one for each request, here of another class, whose noise has another scale."""
    base, other = BUILDERS[family](), BUILDERS[family]()
    if family != "flux":
        other.scheduler = diffusers.DDIMScheduler.from_config(base.scheduler.config)
    plain, expected = draw(base), draw(other)
    negengine.apply(base, SETTINGS)
    merged = draw(base)
    twin = copy.copy(base)
    twin.scheduler = copy.deepcopy(other.scheduler)
    assert torch.equal(draw(twin), expected)
    with pytest.raises(ValueError, match="no method is applied"):
        negengine.status(twin)
    assert torch.equal(draw(base), merged)
    negengine.remove(base)
    assert torch.equal(draw(twin), expected)
    assert torch.equal(draw(base), plain)


@pytest.mark.parametrize("family", ["flux", pytest.param("sdxl", marks=pytest.mark.exhaustive)])
def test_methods_on_a_copy_act_in_its_calls_alone(family):
    """Whether the original has methods of its own or not."""
    base, call = BUILDERS[family](), functools.partial(draw, prompts=1)

    def request(*methods):
        twin = copy.copy(base)
        twin.scheduler = copy.deepcopy(base.scheduler)
        return call(negengine.apply(twin, *methods) if methods else twin)

    plain, merged = call(base), call(negengine.apply(BUILDERS[family](), SETTINGS))
    assert not torch.equal(merged, plain)
    assert [torch.equal(request(SETTINGS), merged), torch.equal(request(), plain), torch.equal(call(base), plain)] == [True] * 3
    negengine.apply(base, dataclasses.replace(SETTINGS, alpha=0.3))
    own = call(base)
    assert [torch.equal(request(SETTINGS), merged), torch.equal(request(), plain), torch.equal(call(base), own)] == [True] * 3
    gc.collect()  # copies that are gone leave nothing
    negengine.remove(base)
    assert not denoiser(base)._forward_pre_hooks


def test_a_method_that_a_user_put_on_the_instance_is_copied():
    class Owner:
        def greet(self, name):
            return f"class {name}"

    heard = []
    owner, plain = Owner(), Owner()
    plain.greet = lambda name: f"mine {name}"
    for each in (owner, plain):
        MethodListener(each, "greet", lambda arguments, result: heard.append(result))
    assert (owner.greet("a"), plain.greet("b")) == ("class a", "mine b") == tuple(heard)
    twins = copy.copy(owner), copy.copy(plain)
    assert "greet" not in vars(twins[0])
    assert (twins[0].greet("c"), twins[1].greet("d")) == ("class c", "mine d")
    assert len(heard) == 2


def test_a_listened_scheduler_can_be_pickled():
    pipe = negengine.apply(sdxl(), SETTINGS)
    twin = pickle.loads(pickle.dumps(pipe.scheduler))
    twin.set_timesteps(3)
    assert pipe.scheduler.num_inference_steps is None
