"""Calls of Z-Image's pipelines as they come: embeddings, a denoiser by itself, and what cannot work, which is refused."""

import functools
import math

import diffusers
import pytest
import torch
from compare import hooked
from tiny import PROMPTS, denoiser, watched
from tiny_z_image import LONG, draw, z_image, z_image_controlnet

import negengine
from negengine import (
    CADS,
    DynamicNegativeGuidance,
    GuidanceInterval,
    NegativePrompting,
    NegToMe,
    NormalizedAttentionGuidance,
    SafeLatentDiffusion,
    SeedVariance,
)

EVERYWHERE = {"timesteps": (0, 1000)}
MERGING = NegToMe(threshold=0.3, **EVERYWHERE)
AWAY = NegativePrompting(prompt=LONG, scale=2.0)


def encoded(pipe, texts):
    return pipe.encode_prompt([*texts], do_classifier_free_guidance=False)[0]


# --- embeddings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [MERGING, AWAY], ids=["negtome", "negative prompting"])
def test_embeddings_beside_their_prompts_are_the_prompts(method):
    pipe = negengine.apply(z_image(), method)
    expected = draw(pipe)
    assert torch.equal(draw(pipe, prompt_embeds=encoded(pipe, PROMPTS[:2])), expected)


def test_embeddings_alone_are_refused():
    """The pipeline encodes nothing then; a run before does not stand in."""
    pipe = negengine.apply(z_image(), MERGING)
    expected, given = draw(pipe), encoded(pipe, PROMPTS[:2])
    draw(pipe)
    for _ in range(2):
        with (
            watched(denoiser(pipe)) as calls,
            pytest.raises(ValueError, match="ZImagePipeline was given prompt_embeds without prompt"),
        ):
            draw(pipe, prompt=None, prompt_embeds=given)
        assert not calls
    assert torch.equal(draw(pipe), expected)


def test_a_prepared_latent_is_no_call():
    """What a user makes with the pipeline's own methods is nothing to negengine."""
    pipe = negengine.apply(z_image(), MERGING)
    latents = pipe.prepare_latents(4, 4, 80, 112, torch.float32, "cpu", torch.Generator().manual_seed(2))
    assert torch.equal(draw(pipe, latents=latents), draw(pipe, seed=2))


def test_embeddings_that_were_not_encoded_last_are_refused():
    """Else their images would be grouped as those of other prompts."""
    pipe = negengine.apply(z_image(), MERGING)
    first = encoded(pipe, PROMPTS[:2])
    encoded(pipe, ["the sea"])
    with pytest.raises(ValueError, match="Give prompt as well"):
        draw(pipe, prompt=None, prompt_embeds=first)
    encoded(pipe, PROMPTS[:3])
    with pytest.raises(ValueError, match="Give prompt as well"):
        draw(pipe, prompt=None, prompt_embeds=first)
    assert torch.isfinite(draw(pipe)).all()


@pytest.mark.exhaustive
def test_embeddings_that_were_encoded_last_are_known():
    pipe = negengine.apply(z_image(), MERGING)
    expected = draw(pipe)
    assert torch.equal(draw(pipe, prompt=None, prompt_embeds=encoded(pipe, PROMPTS[:2])), expected)


def test_embeddings_to_avoid():
    pipe = z_image()
    expected = draw(negengine.apply(pipe, AWAY))
    text = negengine.Embeddings(torch.stack(encoded(pipe, [LONG])))
    assert torch.equal(draw(negengine.apply(pipe, NegativePrompting(prompt=text, scale=2.0))), expected)


# --- the denoiser by itself --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_bare_denoiser():
    pipe, twin = z_image(), z_image()
    texts = [text for text in encoded(pipe, ["a cat", LONG]) for _ in range(2)]
    x = [*torch.randn(4, 4, 1, 10, 14, generator=torch.Generator().manual_seed(0))]
    call = functools.partial(denoiser(pipe), x, torch.full((4,), 0.1), texts, return_dict=False)
    plain = call()[0]
    negengine.apply(denoiser(pipe), NegToMe(group_size=2, threshold=0.3, **EVERYWHERE))
    merged = call()[0]
    status = negengine.status(denoiser(pipe))[NegToMe]
    assert (status.blocks, status.active_blocks) == (3, 3)
    assert 0 < status.merged_tokens < status.eligible_tokens == 3 * 2 * 35
    assert not any(torch.equal(a, b) for a, b in zip(plain[1::2], merged[1::2], strict=True))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain[::2], merged[::2], strict=True))  # the first of a group
    negengine.remove(denoiser(pipe))
    assert all(torch.equal(a, b) for a, b in zip(plain, call()[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, denoiser(twin)(x, torch.full((4,), 0.1), texts)[0], strict=True))


@pytest.mark.parametrize(
    "x, message",
    [
        ([torch.zeros(4, 1, 10, 14), torch.zeros(4, 1, 14, 10)], "images of this call differ in size.*give each size a call"),
        ([[torch.zeros(4, 1, 10, 14)] * 2] * 2, "joins the tokens of other images"),
    ],
    ids=["sizes", "references"],
)
def test_a_batch_that_is_not_of_images_alike(x, message):
    pipe = z_image()
    negengine.apply(denoiser(pipe), NegToMe(group_size=2, **EVERYWHERE))
    with pytest.raises(ValueError, match=message):
        denoiser(pipe)(x, torch.zeros(2), encoded(pipe, PROMPTS[:2]))


# --- what cannot work --------------------------------------------------------------------------------------------


def test_the_pipeline_of_other_images_is_refused():
    pipe = z_image()
    pipe.__class__ = type("ZImageOmniPipeline", (type(pipe),), {})
    with pytest.raises(
        TypeError, match=r"does not support ZImageOmniPipeline: it joins the tokens of other images.*ZImagePipeline"
    ):
        negengine.apply(pipe, MERGING)


@pytest.mark.parametrize(
    "method",
    [AWAY, NormalizedAttentionGuidance(negative_prompt="a"), SafeLatentDiffusion(prompt="a"), CADS()],
    ids=lambda method: method.name,
)
def test_control_nets_know_the_texts_of_the_call_alone(method):
    pipe = z_image_controlnet()
    with pytest.raises(ValueError, match=r"cannot on ZImageControlNetPipeline: its control net adds .*. NegToMe works there"):
        negengine.apply(pipe, method)


@pytest.mark.parametrize(
    "method",
    [AWAY, DynamicNegativeGuidance(prompt="a", surrogate="ancestral"), SafeLatentDiffusion(prompt="a", warmup=0)],
    ids=lambda method: method.name,
)
def test_a_norm_that_comes_after_the_prediction(method):
    pipe = negengine.apply(z_image(), method)
    with watched(denoiser(pipe)) as calls, pytest.raises(ValueError, match=r"by its norm, .* pass cfg_normalization=False"):
        draw(pipe, guidance_scale=1.5, cfg_normalization=True)
    assert not calls
    assert torch.isfinite(draw(pipe, guidance_scale=1.5)).all()


@pytest.mark.parametrize(
    "method",
    [MERGING, NormalizedAttentionGuidance(negative_prompt="a"), SeedVariance(**EVERYWHERE), GuidanceInterval(low=0.5, high=5.0)],
    ids=lambda method: method.name,
)
@pytest.mark.exhaustive
def test_methods_beside_that_norm(method):
    pipe = z_image()
    call = functools.partial(draw, guidance_scale=1.5, cfg_normalization=True)
    plain = call(pipe)
    assert not torch.allclose(call(negengine.apply(pipe, method)), plain, atol=1e-3)


def test_guidance_that_ends_in_the_middle_of_a_run():
    """cfg_truncation leaves the unconditional half out from there on."""
    pipe = negengine.apply(z_image(), AWAY, MERGING)
    with watched(denoiser(pipe)) as calls:
        draw(pipe, guidance_scale=1.5, cfg_truncation=0.2, num_inference_steps=4)
    assert [rows for _, rows in calls] == [12, 12, 8, 8]


@pytest.mark.parametrize(
    "high,truncation,guided,limited,reason",
    [
        (math.inf, 0.2, 2, 0, "every step that the pipeline guides lies in the interval"),
        (0.01, 0.2, 0, 2, None),
        (math.inf, -1.0, 0, 0, "the pipeline guides no step of this run by itself"),
        (0.01, -1.0, 0, 0, "the pipeline guides no step of this run by itself"),
    ],
)
def test_the_interval_counts_what_the_pipeline_itself_guides(high, truncation, guided, limited, reason, caplog):
    pipe = negengine.apply(z_image(), GuidanceInterval(low=0, high=high))
    for _ in range(2):  # counted anew
        draw(pipe, guidance_scale=1.5, cfg_truncation=truncation, num_inference_steps=4)
    (report,) = negengine.status(pipe)
    assert (report.steps, report.guided_steps, report.active_steps) == (4, guided, limited)
    assert str(report).startswith(f"guidance interval on Z-Image: guided {guided} of 4 steps")
    warned = [record.getMessage() for record in caplog.records if record.name == "negengine"]
    assert len(warned) == (2 if reason else 0)
    assert all(reason in text for text in warned)


REFUSED = [
    (
        NegToMe(blocks=("noise_refiner",)),
        {},
        "no attention block of this Z-Image denoiser is named 'noise_refiner'; there are layers.0",
    ),
    (NegToMe(group_size=3), {}, "group_size 3 does not divide this call's 4 images"),
    (NegativePrompting(prompt=("a", "b", "c")), {}, "3 prompts to avoid, but this call has 2"),
    (NegativePrompting(prompt="a", cfg=2.0), {}, "guides in its own batch; leave `cfg` out and pass guidance_scale"),
    (DynamicNegativeGuidance(prompt="a"), {}, "no transition density.*surrogate='ancestral'"),
    (GuidanceInterval(low=0.5, high=5.0), {}, "no classifier-free guidance in this call.*raise guidance_scale"),
]


@pytest.mark.parametrize("method, call, message", REFUSED, ids=["block", "groups", "prompts", "cfg", "sampler", "interval"])
def test_bad_input_before_any_work(method, call, message):
    pipe = z_image()
    with watched(denoiser(pipe)) as calls, pytest.raises(ValueError, match=message):
        draw(negengine.apply(pipe, method), **call)
    assert not calls


def test_after_a_refusal_the_next_call_is_drawn():
    pipe, fresh = z_image(), z_image()
    negengine.apply(pipe, NegToMe(group_size=2, threshold=0.3, **EVERYWHERE))
    with pytest.raises(ValueError, match="does not divide"):
        draw(pipe, prompts=1, n=3)
    expected, _ = hooked(fresh, draw, group_size=2, threshold=0.3, **EVERYWHERE)
    assert torch.equal(draw(pipe), expected)


@pytest.mark.exhaustive
def test_pipelines_that_share_a_denoiser():
    """Each has its own methods, which act in its own calls."""
    pipe = z_image()
    other = diffusers.ZImageImg2ImgPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    plain, plain_other = draw(pipe), draw(other)
    negengine.apply(pipe, MERGING)
    negengine.apply(other, AWAY)
    assert not torch.equal(draw(pipe), plain)
    assert not torch.equal(draw(other), plain_other)
    negengine.remove(pipe)
    assert torch.equal(draw(pipe), plain)
    assert negengine.status(other)[NegativePrompting].active_steps > 0
