"""Dynamic negative guidance and negative prompting in a call: extremes, rows and prompts, and what cannot work."""

import inspect
import logging

import diffusers
import pytest
import torch
from tiny import BETAS, BUILDERS, SIZE, denoiser, draw, flux, sd, sdxl, watched
from transcription import AVOID, LIVELY, PROMPT, SMALL, double

import negengine
from negengine import DynamicNegativeGuidance, NegativePrompting

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
        ("LCMScheduler", {}, "draws each sample anew.*switch to DDPMScheduler or EulerAncestralDiscreteScheduler$"),
        ("PNDMScheduler", {}, "set skip_prk_steps=True"),
        ("EDMEulerScheduler", {}, "EDM.*switch to DDPMScheduler or EulerAncestralDiscreteScheduler$"),
        ("IPNDMScheduler", {}, "does not tell its noise levels.*switch to DDPMScheduler or EulerAncestralDiscreteScheduler$"),
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
