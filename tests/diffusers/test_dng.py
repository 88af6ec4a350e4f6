"""Dynamic negative guidance beside a float64 transcription of its formulas, step by step, for every kind of sampler."""

import inspect
import logging
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from tiny import BETAS, BUILDERS, SIZE, denoiser, draw, flux, kind, sd, sdxl, watched

import negengine
from negengine import DynamicNegativeGuidance, NegativePrompting

PROMPT, AVOID = ["a cat", "two dogs"], "the sea"
LIVELY = {"scale": 2.0, "prior": 0.3, "tau": 0.05, "delta": 1e-3, "p_max": 0.8}


def double(builder, scheduler=None, **config):
    pipe = BUILDERS[builder]()
    if scheduler is not None:
        kept = {} if "FlowMatch" in scheduler else {**BETAS}
        pipe.scheduler = getattr(diffusers, scheduler)(**{**kept, **config})
    for name, parameter in denoiser(pipe).named_parameters():
        # calmer than the other tests want them: differences of the last bit must not grow a thousandfold per step
        if name.endswith(("to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight")):
            parameter.data.mul_(1 / 4)
        if name.endswith("attn2.to_k.weight"):
            parameter.data.mul_(1 / 30)
    return pipe.to(torch.float64)


# --- the transcription -------------------------------------------------------------------------------------------


def conditioning(pipe, texts, n):
    """A function of (latents, timestep) that predicts under ``texts``, one row per image."""
    with torch.no_grad():
        if kind(pipe) == "flux":
            embeds, pooled, ids = pipe.encode_prompt(texts, None, num_images_per_prompt=n, max_sequence_length=11)
        elif kind(pipe) == "sdxl":
            embeds, _, pooled, _ = pipe.encode_prompt(texts, num_images_per_prompt=n, do_classifier_free_guidance=False)
        else:
            embeds, _ = pipe.encode_prompt(texts, "cpu", n, False)
    rows = len(embeds)

    def predict(x, t):
        with torch.no_grad():
            if kind(pipe) == "flux":
                size = SIZE["flux"]
                image_ids = pipe._prepare_latent_image_ids(rows, size["height"] // 16, size["width"] // 16, "cpu", x.dtype)
                return pipe.transformer(
                    hidden_states=x,
                    timestep=t.expand(rows).to(x.dtype) / 1000,
                    guidance=torch.full([rows], 3.5),
                    pooled_projections=pooled,
                    encoder_hidden_states=embeds,
                    txt_ids=ids,
                    img_ids=image_ids,
                    return_dict=False,
                )[0]
            added = None
            if kind(pipe) == "sdxl":
                size = SIZE["sdxl"]["height"], SIZE["sdxl"]["width"]
                times = torch.tensor([[*size, 0, 0, *size]], dtype=x.dtype).repeat(rows, 1)
                added = {"text_embeds": pooled, "time_ids": times}
            return pipe.unet(x, t, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]

    return predict


def levels(scheduler):
    """(signal, noise) of the sample before every step and after the last, in float64."""
    name = type(scheduler).__name__
    if "FlowMatch" in name:
        return [(1 - s, s) for s in scheduler.sigmas.double().tolist()]
    if "Euler" in name or "Heun" in name or "KDPM2" in name:
        return [(1.0, s) for s in scheduler.sigmas.double().tolist()]
    cumulative = [scheduler.alphas_cumprod[int(t)].item() for t in scheduler.timesteps]
    end = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return [(a**0.5, (1 - a) ** 0.5) for a in [*cumulative, end]]


def noise_of(prediction, x, a, b, typ):
    """The prediction as a noise prediction, in variance-exploding units."""
    if typ == "flow":
        clean = x - b * prediction
    elif typ == "v_prediction":
        c = (a * a + b * b) ** 0.5
        clean = (a / c) * (x / c) - (b / c) * prediction
    elif typ == "sample":
        clean = prediction
    else:
        return prediction
    return (x - a * clean) / b


def transcription(pipe, method, steps, scale, x, n, generator, typ, clip=None, order=1):
    """Latents and the posterior before and after every step."""
    scheduler = pipe.scheduler
    null = negatives(pipe) if scale is not None else None
    predict = {"c": conditioning(pipe, PROMPT, n), "n": conditioning(pipe, [AVOID] * 2, n)}
    if scale is not None:
        predict["u"] = conditioning(pipe, null, n)
    if kind(pipe) == "flux":
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(x.shape[1]))
    else:
        scheduler.set_timesteps(steps)
        x = x * scheduler.init_noise_sigma
    table = levels(scheduler)
    p = torch.full((len(x),), method.prior, dtype=torch.float64).clamp(method.p_min, method.p_max)
    history, begun = [p], None
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        c, neg = predict["c"](seen, t), predict["n"](seen, t)
        base = c
        if scale is not None:
            u = predict["u"](seen, t)
            base = u + scale * (c - u)
            if method.negative == "cfg":
                neg = u + scale * (neg - u)
        lam = (method.scale * p / (1 - p)).view(-1, *[1] * (x.ndim - 1))
        guided = base - lam * (neg - base)
        extra = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
        following = scheduler.step(guided, t, x, **extra, return_dict=False)[0]
        if i % order == 0:
            begun = i, x, base, neg
        if i % order == order - 1 or i + 1 == len(scheduler.timesteps):
            j, x0, base, neg = begun
            (a, b), (a_next, b_next) = table[j], table[min(j + order, len(table) - 1)]
            s, s_next = b / a if a else math.inf, b_next / a_next
            if 0 < s_next < s:
                p = update(p, x0, following, base, neg, (a, b, s), (a_next, s_next), typ, method, clip)
            history.append(p)
        x = following
    return x, torch.stack(history)


def update(p, x, following, base, neg, now, then, typ, method, clip):
    (a, b, s), (a_next, s_next) = now, then

    def mean(prediction):
        """Of the next sample, divided by its signal."""
        if typ == "flow" and not a:
            return x - b * prediction  # of pure noise nothing remains
        e = noise_of(prediction, x, a, b, typ)
        if clip is None:
            return x / a + (s_next**2 / s - s) * e  # s_down = s_next^2 / s
        clean = (x / a - s * e).clamp(-clip, clip)
        return (1 - s_next**2 / s**2) * clean + s_next**2 / s**2 * x / a

    variance = s_next**2 if s == math.inf else (s**2 - s_next**2) * s_next**2 / s**2

    def distance(prediction):
        return (following / a_next - mean(prediction)).square().flatten(1).sum(1)

    # tau and delta are in units of the sampler's own samples
    variance, gap = variance * a_next**2, (distance(neg) - distance(base)) * a_next**2
    p = p * ((-method.tau * gap + method.delta) / (2 * variance)).exp()
    return p.clamp(method.p_min, method.p_max)


def negatives(pipe):
    return ["blurred", "dull"]


def start(pipe, n):
    size = SIZE[kind(pipe)]
    generator = torch.Generator().manual_seed(4)
    if kind(pipe) == "flux":
        shape = (2 * n, size["height"] // 16 * (size["width"] // 16), 16)
    else:
        shape = (2 * n, 4, size["height"] // 8, size["width"] // 8)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def both(pipe, twin, method, steps=6, n=2, scale=3.0, typ="epsilon", clip=None, order=1):
    """Ours on ``pipe``, the transcription on ``twin``; compares latents and posteriors."""
    x = start(pipe, n)
    expected, history = transcription(twin, method, steps, scale, x, n, torch.Generator().manual_seed(1), typ, clip, order)
    call = {**SIZE[kind(pipe)], "num_inference_steps": steps, "output_type": "latent", "num_images_per_prompt": n}
    if kind(pipe) == "flux":
        call["max_sequence_length"] = 11
    elif scale is not None:
        call |= {"guidance_scale": scale, "negative_prompt": negatives(pipe)}
    else:
        call["guidance_scale"] = 1.0
    negengine.apply(pipe, method)
    got = pipe(PROMPT, latents=x, generator=torch.Generator().manual_seed(1), **call).images
    report = negengine.status(pipe)[DynamicNegativeGuidance]
    found = torch.tensor(report.p, dtype=torch.float64)
    torch.testing.assert_close(found, history, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert (found[1] - found[0]).abs().max() > 1e-6  # the posterior moves
    assert report.steps == len(twin.scheduler.timesteps)
    return report


SAMPLERS = [
    ("sd", "DDPMScheduler", {"clip_sample": False}),
    ("sd", "DDPMScheduler", {"clip_sample": True, "clip_sample_range": 0.5}),
    ("sd", "DDPMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    ("sd", "DDPMScheduler", {"clip_sample": False, "prediction_type": "sample"}),
    ("sdxl", "DDPMScheduler", {"clip_sample": False}),
    ("sd", "EulerAncestralDiscreteScheduler", {}),
    ("sdxl", "EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("sd", "KDPM2AncestralDiscreteScheduler", {}),
]
SURROGATES = [
    ("sd", "DDIMScheduler", {"clip_sample": False}),
    ("sdxl", "EulerDiscreteScheduler", {}),
    ("sd", "EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
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


@pytest.mark.parametrize("builder", ["sd", "sdxl"])
def test_without_classifier_free_guidance(builder):
    """The base is the one prediction that there is."""
    sampled(builder, "DDPMScheduler", {"clip_sample": False}, None, scale=None)


@pytest.mark.parametrize("builder", ["sd", "sdxl"])
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


SMALL = {"block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
SMALL |= {"transformer_layers_per_block": 1, "attention_head_dim": 1, "layers_per_block": 1}


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


@pytest.mark.parametrize("builder", ["sd", "sdxl", "flux"])
def test_a_fixed_posterior_is_negative_prompting(builder):
    """With tau and delta 0 the posterior stays at the prior: a constant scale, to the bit."""
    fixed = DynamicNegativeGuidance(prompt=AVOID, scale=2.0, prior=0.3, tau=0.0, surrogate="ancestral")
    got = draw(negengine.apply(BUILDERS[builder](), fixed))
    p = math.exp(math.log(0.3))
    constant = NegativePrompting(prompt=AVOID, scale=2.0 * p / (1 - p))
    assert torch.equal(got, draw(negengine.apply(BUILDERS[builder](), constant)))
    assert not torch.equal(got, draw(BUILDERS[builder]()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("builder", ["sd", "sdxl"])
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


# --- robustness --------------------------------------------------------------------------------------------------


ALL_STEPS = [pytest.param(dtype, 1000, marks=pytest.mark.exhaustive) for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("dtype,steps", [(torch.float16, 60), (torch.bfloat16, 60), *ALL_STEPS])
def test_extremes_leave_no_nan(dtype, steps):
    """A prior of 1e-12, a scale of 1e4, as many steps as there are: the posterior stays in its bounds and says what was clamped."""
    pipe = sd(**SMALL).to(dtype)
    pipe.scheduler = diffusers.DDPMScheduler(**BETAS, clip_sample=False)
    method = DynamicNegativeGuidance(prompt=AVOID, scale=1e4, prior=1e-12, tau=1e-4, delta=5.0, p_min=1e-9, p_max=0.999)
    negengine.apply(pipe, method)
    got = draw(pipe, prompts=1, n=1, num_inference_steps=steps, height=32, width=32)
    report = negengine.status(pipe)[DynamicNegativeGuidance]
    p = torch.tensor(report.p, dtype=torch.float64)
    assert p.shape == (steps + 1, 1)
    assert not p.isnan().any()
    assert 1e-9 <= p.min() <= p.max() <= 0.999
    assert p[0, 0] == pytest.approx(1e-9)
    assert report.clamped > 0
    assert "were clamped" in str(report)
    # a push of 1e7 times the difference leaves float16's range; the report then says so, and p stands
    assert got.isfinite().all() if dtype == torch.bfloat16 else report.unusable > 0


def test_a_scheduler_that_adds_more_noise_is_named(caplog):
    pipe = sd()
    pipe.scheduler = diffusers.DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_large")
    negengine.apply(pipe, DynamicNegativeGuidance(prompt=AVOID))
    with caplog.at_level(logging.WARNING, logger="negengine"):
        draw(pipe)
        draw(pipe)
    assert [r.message for r in caplog.records if "adds more noise" in r.message and "variance='release'" in r.message][1:] == []
    assert any("adds more noise" in r.message for r in caplog.records)


# --- the batch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder,guided,rows", [("sd", True, 3), ("sdxl", True, 3), ("sdxl", False, 2), ("flux", False, 2)])
def test_branches_are_rows_of_one_batch(builder, guided, rows):
    pipe = BUILDERS[builder]()
    negengine.apply(pipe, NegativePrompting(prompt=AVOID))
    call = {} if builder == "flux" else {"guidance_scale": 3.0 if guided else 1.0}
    with watched(denoiser(pipe)) as calls:
        draw(pipe, n=3, **call)
    # 2 prompts x 3 images; the hook that counts runs after ours
    assert [n for _, n in calls] == [6 * rows] * 3


def test_a_prompt_for_each_prompt(family):
    """One text per prompt of the call gives each prompt's images its own."""
    each = draw(negengine.apply(BUILDERS[family](), NegativePrompting(prompt=(AVOID, "noise"), scale=2.0)))
    one = draw(negengine.apply(BUILDERS[family](), NegativePrompting(prompt=AVOID, scale=2.0)))
    other = draw(negengine.apply(BUILDERS[family](), NegativePrompting(prompt="noise", scale=2.0)))
    torch.testing.assert_close(each[:2], one[:2])
    torch.testing.assert_close(each[2:], other[2:])
    assert not torch.allclose(one, other, atol=1e-3)


def test_embeddings_in_place_of_text(family):
    pipe = double(family)
    expected = draw(negengine.apply(pipe, NegativePrompting(prompt=AVOID, scale=2.0)))
    # encoding by hand between calls belongs to none
    if family == "flux":
        text, pooled, _ = pipe.encode_prompt([AVOID], None, max_sequence_length=11)
    else:
        text, _, pooled, _ = pipe.encode_prompt([AVOID], do_classifier_free_guidance=False)
    given = negengine.Embeddings(text.detach(), pooled.detach())
    torch.testing.assert_close(draw(negengine.apply(pipe, NegativePrompting(prompt=given, scale=2.0))), expected)


def test_a_longer_prompt_of_the_call(family):
    """Embeddings of several chunks: the prompt to avoid is filled up with the empty prompt."""
    pipe = BUILDERS[family]()
    if family == "flux":
        text, pooled, _ = pipe.encode_prompt(PROMPT, None, num_images_per_prompt=1, max_sequence_length=23)
        call = {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "max_sequence_length": 23}
    else:
        text, _, pooled, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
        call = {"prompt_embeds": torch.cat([text, text], 1), "pooled_prompt_embeds": pooled}
        call |= {"guidance_scale": 1.0}
    size = {**SIZE[family], "num_inference_steps": 2, "output_type": "latent"}
    plain = pipe(**call, **size, generator=torch.Generator().manual_seed(0)).images
    negengine.apply(pipe, NegativePrompting(prompt=AVOID, scale=2.0))
    got = pipe(**call, **size, generator=torch.Generator().manual_seed(0)).images
    assert got.shape == plain.shape
    assert not torch.allclose(got, plain, atol=1e-3)


# --- what cannot work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_samplers_without_a_density_are_refused(scheduler):
    pipe = double("sd", scheduler)
    with pytest.raises(
        ValueError, match=rf"{scheduler} has no transition density; switch to .*DDPMScheduler.*surrogate='ancestral'"
    ):
        negengine.apply(pipe, DynamicNegativeGuidance(prompt=AVOID))


def test_a_sampler_that_came_later_is_refused_before_the_first_step():
    pipe = negengine.apply(double("sd", "DDPMScheduler"), DynamicNegativeGuidance(prompt=AVOID))
    pipe.scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    with watched(pipe.unet) as calls, pytest.raises(ValueError, match="no transition density"):
        draw(pipe)
    assert not calls


@pytest.mark.parametrize(
    "scheduler,config,message",
    [
        ("DDPMScheduler", {"thresholding": True}, "dynamic thresholding"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "takes its variance from the denoiser"),
        ("LCMScheduler", {}, "draws each sample anew"),
        ("PNDMScheduler", {}, "set skip_prk_steps=True"),
        ("EDMEulerScheduler", {}, "EDM"),
        ("IPNDMScheduler", {}, "does not tell its noise levels"),
    ],
)
def test_steps_that_cannot_be_followed(scheduler, config, message):
    pipe = sd()
    betas = BETAS if "beta_start" in inspect.signature(getattr(diffusers, scheduler)).parameters else {}
    pipe.scheduler = getattr(diffusers, scheduler)(**betas, **config)
    with pytest.raises(ValueError, match=message):
        negengine.apply(pipe, DynamicNegativeGuidance(prompt=AVOID, surrogate="ancestral"))


def test_true_cfg_of_the_pipeline_is_refused_before_the_first_step():
    pipe = negengine.apply(flux(), NegativePrompting(prompt=AVOID))
    expected = r"true_cfg_scale=1, and NegativePrompting\(cfg=...\)"
    with watched(pipe.transformer) as calls, pytest.raises(ValueError, match=expected):
        draw(pipe, true_cfg_scale=2.0, negative_prompt=["dull", "grey"])
    assert not calls
    draw(pipe)  # the next call is not taken for the second half of this one


def test_guidance_of_its_own_where_the_pipeline_has_some():
    with pytest.raises(ValueError, match=r"leave `cfg` out and pass guidance_scale"):
        negengine.apply(sdxl(), NegativePrompting(prompt=AVOID, cfg=2.0))


def test_a_bare_denoiser(family):
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        negengine.apply(denoiser(BUILDERS[family]()), DynamicNegativeGuidance(prompt=AVOID))


def test_as_many_prompts_as_the_call_has(family):
    pipe = negengine.apply(BUILDERS[family](), NegativePrompting(prompt=("a", "b", "c")))
    with watched(denoiser(pipe)) as calls, pytest.raises(ValueError, match="3 prompts to avoid, but this call has 2"):
        draw(pipe)
    assert not calls


def test_keys_of_other_schedulers_are_not_taken_for_its_own():
    """`from_config` carries them along: a deterministic sampler stays one, and a step that does not clip is judged as such."""
    pipe = sd()
    sde = diffusers.DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++", solver_order=1)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(sde.config)
    with pytest.raises(ValueError, match="no transition density"):
        negengine.apply(pipe, DynamicNegativeGuidance(prompt=AVOID))
    found = []
    for config in (
        diffusers.DDPMScheduler(**BETAS, clip_sample=True).config,
        diffusers.DDPMScheduler(**BETAS, clip_sample=False).config,
    ):
        pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(config)
        draw(negengine.apply(pipe, DynamicNegativeGuidance(prompt=AVOID, **LIVELY)))
        found.append(negengine.status(pipe)[DynamicNegativeGuidance].p)
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_text_without_a_text_encoder(family):
    pipe = BUILDERS[family]()
    if family == "flux":
        text, pooled, _ = pipe.encode_prompt(PROMPT, None, max_sequence_length=11)
    else:
        text, _, pooled, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    pipe.text_encoder = pipe.text_encoder_2 = None
    call = {"prompt_embeds": text.detach(), "pooled_prompt_embeds": pooled.detach(), "num_inference_steps": 1, **SIZE[family]}
    call |= {} if family == "flux" else {"guidance_scale": 1.0}
    negengine.apply(pipe, NegativePrompting(prompt=AVOID))
    with pytest.raises(ValueError, match=r"no text encoder .* give negengine\.Embeddings"):
        pipe(**call)
    narrow = negengine.Embeddings(text.detach()[..., :-1], pooled.detach())
    negengine.apply(pipe, NegativePrompting(prompt=narrow))
    with pytest.raises(ValueError, match="channels, those of this call"):
        pipe(**call)
