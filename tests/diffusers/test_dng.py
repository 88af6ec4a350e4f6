"""Dynamic negative guidance beside a float64 transcription of its formulas, step by step, for every kind of sampler."""

import math

import diffusers
import pytest
import torch
from tiny import BUILDERS, draw, sd
from transcription import AVOID, LIVELY, SMALL, both, double

import negengine
from negengine import DynamicNegativeGuidance, NegativePrompting

REST = pytest.mark.exhaustive
UNETS = pytest.mark.parametrize("builder", ["sd", pytest.param("sdxl", marks=REST)])
SAMPLERS = [
    ("sd", "DDPMScheduler", {"clip_sample": False}),
    ("sd", "DDPMScheduler", {"clip_sample": True, "clip_sample_range": 0.5}),
    pytest.param("sd", "DDPMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}, marks=REST),
    ("sd", "DDPMScheduler", {"clip_sample": False, "prediction_type": "sample"}),
    pytest.param("sdxl", "DDPMScheduler", {"clip_sample": False}, marks=REST),
    pytest.param("sd", "EulerAncestralDiscreteScheduler", {}, marks=REST),
    ("sdxl", "EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("sd", "KDPM2AncestralDiscreteScheduler", {}),
]
SURROGATES = [
    ("sd", "DDIMScheduler", {"clip_sample": False}),
    ("sdxl", "EulerDiscreteScheduler", {}),
    pytest.param("sd", "EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, marks=REST),
    ("sd", "DPMSolverMultistepScheduler", {}),
    ("sd", "HeunDiscreteScheduler", {}),
    ("flux", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
]


def sampled(builder, scheduler, config, surrogate, **kwargs):
    typ = "flow" if builder == "flux" else config.get("prediction_type", "epsilon")
    clip = config.get("clip_sample_range") if config.get("clip_sample") else None
    order = 2 if "Heun" in scheduler or "KDPM2" in scheduler else 1
    pipe, twin = double(builder, scheduler, **config), double(builder, scheduler, **config)
    method = DynamicNegativeGuidance(prompt=AVOID, surrogate=surrogate, **{**LIVELY, **kwargs.pop("settings", {})})
    return both(pipe, twin, method, typ=typ, clip=clip, order=order, **kwargs)


@pytest.mark.parametrize("builder,scheduler,config", SAMPLERS)
def test_samplers_with_a_density(builder, scheduler, config):
    sampled(builder, scheduler, config, None)


@pytest.mark.parametrize("builder,scheduler,config", SURROGATES)
def test_samplers_without_take_the_surrogate(builder, scheduler, config):
    sampled(builder, scheduler, config, "ancestral", scale=None if builder == "flux" else 3.0)


@UNETS
def test_without_classifier_free_guidance(builder):
    """The base is the one prediction that there is."""
    sampled(builder, "DDPMScheduler", {"clip_sample": False}, None, scale=None)


@UNETS
def test_a_guided_negative(builder):
    sampled(builder, "DDPMScheduler", {"clip_sample": False}, None, settings={"negative": "cfg"})


@pytest.mark.parametrize("negative", ["raw", "cfg"])
def test_flux_with_guidance_of_its_own(negative):
    config = {"use_dynamic_shifting": True}
    settings = {"cfg": 2.0, "cfg_prompt": ("blurred", "dull"), "negative": negative}
    sampled("flux", "FlowMatchEulerDiscreteScheduler", config, "ancestral", scale=2.0, settings=settings)


# --- the published loop ------------------------------------------------------------------------------------------


def beta_table(steps):
    """The code's table, and one as noisy in fewer steps."""
    return torch.linspace(1e-4, 2e-2, steps, dtype=torch.float32).double() * (1000 / steps)


def published(unet, base_text, avoid_text, x, method, generator, steps):
    """The loop of the code published with the paper, from its description: every step, posterior in linear space."""
    betas = beta_table(steps)
    alphas = 1 - betas
    cumulative = alphas.cumprod(0)
    p, history = torch.full((len(x),), method.prior, dtype=torch.float64), []
    for t in reversed(range(steps)):
        with torch.no_grad():
            e = unet(x, t, encoder_hidden_states=base_text, return_dict=False)[0]
            avoided = unet(x, t, encoder_hidden_states=avoid_text, return_dict=False)[0]
        guided = e - (method.scale * p / (1 - p)).view(-1, 1, 1, 1) * (avoided - e)

        def mean(a, x=x, t=t):
            return (x - betas[t] / (1 - cumulative[t]).sqrt() * a) / alphas[t].sqrt()

        following = mean(guided)
        if t:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            following = following + betas[t].sqrt() * noise
        before = cumulative[t - 1] if t else cumulative[0]
        variance = (1 - before) / (1 - cumulative[t]) * betas[t]
        gap = [(following - mean(a)).square().sum((1, 2, 3)) for a in (avoided, e)]
        p = p * ((-method.tau * (gap[0] - gap[1]) + method.delta) / (2 * variance)).exp()
        p = p.clamp(method.p_min, method.p_max)
        history.append(p)
        x = following
    return x, torch.stack(history)


@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_the_published_loop(steps):
    """The release's settings; a weaker scale, at which a random model's posterior keeps moving."""
    pipe = sd(**SMALL).to(torch.float64)
    betas = beta_table(steps)
    pipe.scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=steps, trained_betas=betas.tolist(), clip_sample=False, variance_type="fixed_large"
    )
    pipe.scheduler.betas, pipe.scheduler.alphas_cumprod = betas, (1 - betas).cumprod(0)  # float64, as the loop beside it
    method = DynamicNegativeGuidance.preset("release", prompt=AVOID, prior=0.2, tau=0.4 if steps == 1000 else 4.0, scale=1.0)
    assert (method.delta, method.variance, method.p_max) == (0, "release", 0.8)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    texts = [pipe.encode_prompt([text], "cpu", 2, False)[0] for text in ("a cat", AVOID)]
    expected, history = published(pipe.unet, *texts, x, method, torch.Generator().manual_seed(5), steps)
    negengine.apply(pipe, method)
    call = {"num_inference_steps": steps, "height": 32, "width": 32, "guidance_scale": 1.0, "num_images_per_prompt": 2}
    got = pipe(["a cat"], latents=x, generator=torch.Generator().manual_seed(5), output_type="latent", **call).images
    found = torch.tensor(negengine.status(pipe)[DynamicNegativeGuidance].p, dtype=torch.float64)[1:]
    assert found.shape == (steps, 2)
    assert (found - history).abs().max() < 1e-6
    assert float(history.max() - history.min()) > 0.05
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# --- limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", ["sd", pytest.param("sdxl", marks=REST), "flux"])
def test_a_fixed_posterior_is_negative_prompting(builder):
    """With tau and delta 0 the posterior stays at the prior: a constant scale, to the bit."""
    fixed = DynamicNegativeGuidance(prompt=AVOID, scale=2.0, prior=0.3, tau=0.0, surrogate="ancestral")
    got = draw(negengine.apply(BUILDERS[builder](), fixed))
    p = math.exp(math.log(0.3))
    constant = NegativePrompting(prompt=AVOID, scale=2.0 * p / (1 - p))
    assert torch.equal(got, draw(negengine.apply(BUILDERS[builder](), constant)))
    assert not torch.equal(got, draw(BUILDERS[builder]()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@UNETS
def test_negative_prompting_as_diffusers_has_it(builder, dtype):
    """With the conditional prediction as base, a scale of w - 1 is guidance_scale w with that negative prompt."""
    pipe, own = (double(builder, "DDIMScheduler", clip_sample=False).to(dtype) for _ in range(2))
    negengine.apply(pipe, NegativePrompting(prompt=AVOID, scale=3.0))
    got = draw(pipe, guidance_scale=1.0, num_inference_steps=2)
    expected = draw(own, guidance_scale=4.0, negative_prompt=[AVOID] * 2, num_inference_steps=2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)


def test_guidance_rescale_leaves_the_result_alone():
    """The pipeline rescales what we return by the ratio of two equal deviations; the base has been rescaled before."""
    pipe, twin = (double("sd", "DDIMScheduler", clip_sample=False) for _ in range(2))
    negengine.apply(pipe, NegativePrompting(prompt=AVOID, scale=0.0))
    rescaled = {"guidance_rescale": 0.7, "guidance_scale": 5.0}
    torch.testing.assert_close(draw(pipe, **rescaled), draw(twin, **rescaled), rtol=1e-10, atol=1e-10)
    negengine.apply(pipe, NegativePrompting(prompt=AVOID, scale=1.5))
    plain = {"guidance_scale": 5.0}
    assert (draw(pipe, **rescaled) - draw(pipe, **plain)).abs().max() > 1e-3
