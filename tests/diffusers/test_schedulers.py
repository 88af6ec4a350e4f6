"""Whether a step is active is decided by the timestep that the denoiser is called with, whatever the scheduler."""

import functools

import diffusers
import pytest
import torch
from compare import assert_same, literal
from literal import Literal
from tiny import BUILDERS, denoiser, draw, flux, sdxl, watched

import negengine
from negengine.diffusers.clock import Clock

REST = pytest.mark.exhaustive
SCHEDULERS = [
    ("sdxl", "EulerDiscreteScheduler", {}),
    pytest.param("sdxl", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, marks=REST),
    pytest.param("sdxl", "EulerAncestralDiscreteScheduler", {}, marks=REST),
    pytest.param("sdxl", "DDIMScheduler", {}, marks=REST),
    ("sdxl", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("sdxl", "HeunDiscreteScheduler", {}),
    pytest.param("sdxl", "UniPCMultistepScheduler", {}, marks=REST),
    ("flux", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    pytest.param("flux", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, marks=REST),
    ("flux", "UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
]


def use(pipe, name, config):
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **config)


@pytest.mark.parametrize("builder,name,config", SCHEDULERS)
def test_part_of_the_run(builder, name, config):
    window = (550, 1000)
    prepare = functools.partial(use, name=name, config=config)
    call = functools.partial(draw, num_inference_steps=5)
    status = assert_same(builder, call, 2, prepare=prepare, timesteps=window)
    pipe = BUILDERS[builder]()
    prepare(pipe)
    with watched(denoiser(pipe)) as calls:
        call(pipe)
    inside = sum(window[0] <= t <= window[1] for t, _ in calls)
    assert (status.steps, status.active_steps) == (len(calls), inside)
    assert 0 < inside < len(calls)


def test_flow_match_heun():
    """A second-order sampler calls twice at a timestep; FLUX's pipeline cannot run it, so the loop is written out."""

    def call(model, scheduler):
        generator = torch.Generator().manual_seed(3)
        latents, text, pooled = (torch.randn(*s, generator=generator) for s in ((4, 35, 16), (4, 7, 32), (4, 32)))
        scheduler.set_timesteps(4)
        with torch.no_grad():
            for t in scheduler.timesteps:
                inputs = {
                    "hidden_states": latents,
                    "timestep": t.expand(4) / 1000,
                    "guidance": torch.ones(4),
                    "encoder_hidden_states": text,
                    "pooled_projections": pooled,
                    "txt_ids": torch.zeros(7, 3),
                    "img_ids": torch.arange(35.0)[:, None].expand(35, 3),
                }
                latents = scheduler.step(model(**inputs, return_dict=False)[0], t, latents).prev_sample
        return latents

    pipe, twin = flux(), flux()
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    settings = negengine.NegToMe(group_size=2, timesteps=(500, 1000), threshold=0.85)
    negengine.apply(pipe.transformer, settings, scheduler=scheduler)
    Literal(twin, 2, threshold=0.85, window=(500, 1000))
    with watched(twin.transformer) as calls:
        expected = call(twin.transformer, diffusers.FlowMatchHeunDiscreteScheduler())
    assert torch.equal(call(pipe.transformer, scheduler), expected)
    assert 0 < sum(t >= 500 for t, _ in calls) < len(calls) == 7


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_noise_levels_of_flow_matching(name):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(5)
    clock = Clock()
    clock.schedule(scheduler)
    for position, sigma in enumerate(scheduler.sigmas[:-1].tolist()):
        assert clock.seen(position) == pytest.approx((1 - sigma, sigma, 1))


@pytest.mark.parametrize("builder", ["flux_img2img", "sdxl_img2img"])
def test_image_to_image_begins_late(builder):
    """With strength 0.6 a run begins at 600 or below; the window 450 ... 1000 then holds its first steps only."""
    call = functools.partial(draw, num_inference_steps=10, strength=0.6)
    status = assert_same(builder, call, 2, timesteps=(450, 1000))
    pipe = BUILDERS[builder]()
    with watched(denoiser(pipe)) as calls:
        call(pipe)
    assert status.steps == len(calls) < 10
    assert status.active_steps == sum(t >= 450 for t, _ in calls) > 0
    assert status.active_steps < status.steps


@pytest.mark.parametrize("builder", ["flux_img2img", "sdxl_img2img"])
def test_image_to_image_that_begins_below_the_window(builder):
    """The first step of such a run is not the first of the scheduler's table."""
    pipe = BUILDERS[builder]()
    call = functools.partial(draw, num_inference_steps=10, strength=0.6)
    plain = call(pipe)
    negengine.apply(pipe, negengine.NegToMe(timesteps=(850, 1000), threshold=-1, min_grid=1))
    assert torch.equal(call(pipe), plain)
    status = negengine.status(pipe)[negengine.NegToMe]
    assert status.active_steps == 0 < status.steps


@pytest.mark.parametrize("builder", ["flux_controlnet", "sdxl_controlnet"])
def test_control_nets(builder):
    assert_same(builder, functools.partial(draw, n=3), 3, timesteps=(500, 1000))


def test_steps_outside_the_window_are_untouched(family):
    """Before the first active step latents are those of the plain pipeline; from it on they are not."""

    def latents_by_step(pipe):
        seen = []

        def keep(pipe, step, timestep, tensors):
            seen.append((float(timestep), tensors["latents"].clone()))
            return {}

        draw(pipe, num_inference_steps=6, callback_on_step_end=keep)
        return seen

    pipe = BUILDERS[family]()
    plain = latents_by_step(pipe)
    negengine.apply(pipe, negengine.NegToMe(timesteps=(100, 600), threshold=-1, min_grid=1))
    merged = latents_by_step(pipe)
    for (t, a), (_, b) in zip(plain, merged, strict=True):
        assert torch.equal(a, b) == (t > 600)


@pytest.mark.parametrize("everywhere", [False, True], ids=["scheduler", "everywhere"])
def test_bare_unet(everywhere):
    """A denoiser without its pipeline, told the timestep by its scheduler, or always active."""
    pipe, twin = sdxl(), sdxl()
    window = (0, 1000) if everywhere else (400, 1000)
    settings = negengine.NegToMe(group_size=2, timesteps=window, threshold=0.85, min_grid=1)
    negengine.apply(pipe.unet, settings, scheduler=None if everywhere else pipe.scheduler)
    expected, seed = literal(twin, draw, 2, timesteps=window)
    assert torch.equal(draw(pipe, seed=seed), expected)
    status = negengine.status(pipe.unet)[negengine.NegToMe]
    assert (status.steps, status.active_steps) == (3, 3 if everywhere else 2)
    negengine.remove(pipe.unet)
    assert torch.equal(draw(pipe), draw(sdxl()))
