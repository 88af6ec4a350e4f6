"""Pipelines that share a denoiser: methods act in the calls of those that they were applied to."""

import copy
import gc
import threading

import diffusers
import pytest
import torch
from tiny import BUILDERS, SIZE, denoiser, draw, kind, watched

import negengine

MERGE = {"timesteps": (0, 1000), "threshold": -1, "min_grid": 1}
METHODS = {
    "negtome": negengine.NegToMe(**MERGE),
    "negative-prompting": negengine.NegativePrompting(prompt="the sea", scale=2.0),
    "cads": negengine.CADS(tau1=0.2, tau2=0.6, unconditional=True),
}


def sharing(pipe, scheduler=None):
    """Another pipeline of the same parts, with a scheduler of its own if one is given."""
    extra = {} if kind(pipe) == "flux" else {"add_watermarker": False}
    other = type(pipe)(**pipe.components | ({"scheduler": scheduler} if scheduler else {}), **extra)
    other.set_progress_bar_config(disable=True)
    return other


def alone(family, *methods):
    return draw(negengine.apply(BUILDERS[family](), *methods) if methods else BUILDERS[family]())


SCHEDULERS = [pytest.param(False, marks=pytest.mark.exhaustive, id="one scheduler"), pytest.param(True, id="a scheduler each")]
SECOND = ["cads", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("negtome", "negative-prompting"))]


@pytest.mark.parametrize("own_scheduler", SCHEDULERS)
@pytest.mark.parametrize("second", SECOND)
def test_each_has_its_own_methods(family, second, own_scheduler):
    first = negengine.apply(BUILDERS[family](), METHODS["negtome"])
    other = sharing(first, copy.deepcopy(first.scheduler) if own_scheduler else None)
    third = sharing(first)
    negengine.apply(other, METHODS[second])
    expected = alone(family, METHODS["negtome"]), alone(family, METHODS[second]), alone(family)
    for _ in range(2):
        for pipe, images in zip((first, other, third), expected, strict=True):
            assert torch.equal(draw(pipe), images)
    told = negengine.status(first)
    draw(other, n=1, num_inference_steps=2)
    assert negengine.status(first) == told
    with pytest.raises(ValueError, match=r"no method is applied to this .*; those on the .* act in the calls of that one"):
        negengine.status(third)
    negengine.remove(other)
    assert torch.equal(draw(other), expected[2])
    assert torch.equal(draw(first), expected[0])
    negengine.remove(first)
    assert not denoiser(first)._forward_pre_hooks
    assert torch.equal(draw(first), expected[2])


def test_removing_from_the_denoiser_removes_from_all(family):
    first = negengine.apply(BUILDERS[family](), METHODS["negtome"])
    other = negengine.apply(sharing(first), METHODS["cads"])
    negengine.remove(denoiser(first))
    assert torch.equal(draw(first), alone(family))
    assert torch.equal(draw(other), alone(family))


def test_text_to_image_and_image_to_image():
    base = negengine.apply(BUILDERS["sdxl"](), METHODS["negtome"])
    other = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(base)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(draw(other), draw(BUILDERS["sdxl_img2img"]()))
    negengine.apply(other, METHODS["negtome"])
    expected = draw(negengine.apply(BUILDERS["sdxl_img2img"](), METHODS["negtome"]))
    assert torch.equal(draw(other), expected)
    assert torch.equal(draw(base), alone("sdxl", METHODS["negtome"]))


def test_a_pipeline_that_is_gone_leaves_nothing(family):
    first = BUILDERS[family]()
    other = negengine.apply(sharing(first), METHODS["negtome"])
    draw(other)
    del other
    gc.collect()
    negengine.apply(first, METHODS["cads"])
    with watched(denoiser(first)):
        assert torch.equal(draw(first), alone(family, METHODS["cads"]))
    assert len(denoiser(first)._forward_pre_hooks) == 1


def test_a_call_from_a_callback_of_another(family):
    """The outer call's methods rest while the inner one runs."""
    outer = negengine.apply(BUILDERS[family](), METHODS["negtome"])
    inner = sharing(outer, copy.deepcopy(outer.scheduler))
    negengine.apply(inner, METHODS["cads"])
    seen = []

    def preview(pipe, i, timestep, tensors):
        seen.append(draw(inner, prompts=1, n=1, num_inference_steps=2))
        return {}

    drawn = draw(outer, callback_on_step_end=preview)
    expected = draw(negengine.apply(BUILDERS[family](), METHODS["cads"]), prompts=1, n=1, num_inference_steps=2)
    assert all(torch.equal(images, expected) for images in seen)
    assert torch.equal(drawn, alone(family, METHODS["negtome"]))
    assert negengine.status(outer)[negengine.NegToMe].active_steps == 3


NAG = negengine.NormalizedAttentionGuidance(negative_prompt="the sea", timesteps=(0, 1000))
OUTER = [METHODS["negtome"], *(pytest.param(m, marks=pytest.mark.exhaustive) for m in (METHODS["negative-prompting"], NAG))]


@pytest.mark.parametrize("method", OUTER, ids=["NegToMe", "negative prompting", "NAG"])
def test_a_pipeline_without_methods_called_from_a_callback(family, method):
    outer = BUILDERS[family]()
    plain = sharing(outer, copy.deepcopy(outer.scheduler))
    expected = draw(plain, prompts=1, n=3)
    by_itself = draw(negengine.apply(outer, method))
    seen = []

    def preview(pipe, i, timestep, tensors):
        seen.append(draw(plain, prompts=1, n=3))
        return {}

    assert torch.equal(draw(outer, callback_on_step_end=preview), by_itself)
    assert len(seen) == 3
    assert all(torch.equal(images, expected) for images in seen)


def test_a_pipeline_without_methods_on_another_thread(family):
    """It begins in the middle of a step in which methods act, and goes on through the rest of the call."""
    first = BUILDERS[family]()
    plain = sharing(first, copy.deepcopy(first.scheduler))
    expected, by_itself = draw(plain), draw(negengine.apply(first, METHODS["negtome"]))
    model, found, threads = denoiser(first), [], []
    block = model.single_transformer_blocks[0] if family == "flux" else model.mid_block

    def meanwhile(module, args, kwargs):
        if not threads:
            threads.append(in_thread(plain, found))
            threads[0].start()
            threads[0].join()

    block.register_forward_pre_hook(meanwhile, with_kwargs=True)
    assert torch.equal(draw(first), by_itself)
    assert torch.equal(found[0], expected)


def test_after_a_refused_call_a_pipeline_without_methods_has_none(family):
    first = BUILDERS[family]()
    plain = sharing(first, copy.deepcopy(first.scheduler))
    expected = draw(plain)
    negengine.apply(first, METHODS["negtome"])
    with pytest.raises(ValueError, match="generators of length 3"):
        first("a cat", num_images_per_prompt=2, generator=[torch.Generator()] * 3, num_inference_steps=2, **SIZE[family])
    assert torch.equal(draw(plain), expected)
    assert negengine.status(first)["negtome"].stage == "failed"


class Stop(Exception):
    pass


def test_a_call_that_failed_before_its_first_step_is_over(family, monkeypatch):
    first = negengine.apply(BUILDERS[family](), METHODS["negtome"])
    other = negengine.apply(sharing(first, copy.deepcopy(first.scheduler)), METHODS["cads"])

    def fail(*args, **kwargs):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(first, "prepare_latents", fail)
        with pytest.raises(Stop):
            draw(first)
    assert torch.equal(draw(other), alone(family, METHODS["cads"]))
    assert torch.equal(draw(first), alone(family, METHODS["negtome"]))


def in_thread(pipe, found):
    def work():
        try:
            found.append(draw(pipe))
        except Exception as error:
            found.append(error)

    return threading.Thread(target=work)


def test_two_threads_at_once_are_refused(family):
    """In the middle of one call, another thread begins one on the same denoiser; afterwards both go on."""
    first = negengine.apply(BUILDERS[family](), METHODS["negtome"])
    other = negengine.apply(sharing(first, copy.deepcopy(first.scheduler)), METHODS["cads"])
    found = []

    def meanwhile(pipe, i, timestep, tensors):
        thread = in_thread(other, found)
        thread.start()
        thread.join()
        return {}

    drawn = draw(first, callback_on_step_end=meanwhile)
    assert all(isinstance(error, RuntimeError) and "another thread is in the middle" in str(error) for error in found)
    assert len(found) == 3
    assert torch.equal(drawn, alone(family, METHODS["negtome"]))
    assert torch.equal(draw(other), alone(family, METHODS["cads"]))


def test_a_call_that_was_overtaken_before_its_first_step_is_refused(family, monkeypatch):
    first = negengine.apply(BUILDERS[family](), METHODS["negtome"])
    other = negengine.apply(sharing(first, copy.deepcopy(first.scheduler)), METHODS["cads"])
    found = []
    prepare = type(first).prepare_latents

    def overtaken(*args, **kwargs):
        thread = in_thread(other, found)
        thread.start()
        thread.join()
        return prepare(first, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(first, "prepare_latents", overtaken)
        with pytest.raises(RuntimeError, match="began before this one's first step"):
            draw(first)
    assert torch.equal(found[0], alone(family, METHODS["cads"]))
    assert torch.equal(draw(first), alone(family, METHODS["negtome"]))
