"""The chain of negative image, caption and final run where the model has no negative branch: NAG avoids the caption."""

import logging

import pytest
import tiny
import torch
from test_apply_remove import state

import negengine
from negengine import CADS, NegativePrompting, NormalizedAttentionGuidance
from negengine.methods import DiffusionNegativePrompt

PROMPTS, SEEDS, W = ["a cat", "two dogs"], [5, 11], 4.0
NAG = NormalizedAttentionGuidance(scale=3.0, alpha=0.5)
CALL = {
    "flux": {"height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 11},
    "sd": {"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 1.0},
    "sdxl": {"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 3.0},
}
BUILDERS = ["flux", "sd", "sdxl"]


def words(image):
    return f"picture {sum(image.tobytes()) % 1000}"


def prompting(pipe, avoid_with=NAG, guidance=W, **arguments):
    settings = DiffusionNegativePrompt(captioner=words, guidance=guidance, avoid_with=avoid_with)
    call = {**CALL[tiny.kind(pipe)], **arguments}
    return negengine.diffusion_negative_prompting(pipe, PROMPTS, settings, seed=SEEDS, **call)


def avoiding(pipe, texts, seeds=SEEDS, **arguments):
    """An ordinary run with NAG away from a text for each prompt."""
    negengine.apply(pipe, NormalizedAttentionGuidance(negative_prompt=texts, scale=3.0, alpha=0.5))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipe(PROMPTS, generator=generators, **{**CALL[tiny.kind(pipe)], **arguments}).images
    negengine.remove(pipe, NormalizedAttentionGuidance)
    return images


def pixels(images):
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("builder", BUILDERS)
def test_the_final_run_avoids_the_caption_by_nag(builder):
    pipe, twin = tiny.BUILDERS[builder](), tiny.BUILDERS[builder]()
    tiny.draw(pipe)  # diffusers leaves some things at the first call
    before = state(pipe)
    records = prompting(pipe)
    call = CALL[builder]
    pictures = negengine.diffusion_negative_image(twin, PROMPTS, seed=SEEDS, guidance=W, **call)
    captions = [words(picture) for picture in pictures]
    assert pixels(record.negative_image for record in records) == pixels(pictures)
    assert [(record.caption, record.negative_prompt) for record in records] == list(zip(captions, captions, strict=True))
    assert captions[0] != captions[1]
    got = pixels(record.images[0] for record in records)
    assert got == pixels(avoiding(twin, captions))
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    assert got != pixels(twin(PROMPTS, generator=generators, **call).images)
    assert state(pipe) == before  # NAG was there for one run
    told = records[0].told["dnp"]
    assert (told["guidance"], told["avoid_with"]["scale"], told["avoid_with"]["tau"]) == (W, 3.0, 2.5)


def test_true_guidance_of_flux_is_for_the_negative_image_alone():
    """A scale in the call draws the negative image; the final run calls the denoiser once per step."""
    pipe, twin = tiny.flux(), tiny.flux()
    with tiny.watched(pipe.transformer) as calls:
        records = prompting(pipe, guidance=None, true_cfg_scale=W)
    assert [rows for _, rows in calls] == [2] * 4 + [4] * 2  # two calls in each of two steps; then NAG's rows beside the others
    assert pixels(record.images[0] for record in records) == pixels(
        record.images[0] for record in prompting(twin, guidance=W, guidance_scale=3.5)
    )


@pytest.mark.parametrize("builder", BUILDERS)
def test_the_users_own_negative_prompt_and_several_images(builder):
    pipe, twin = tiny.BUILDERS[builder](), tiny.BUILDERS[builder]()
    records = prompting(pipe, negative_prompt=["dull", "grey"], num_images_per_prompt=2)
    texts = [record.negative_prompt for record in records]
    assert texts == [f"{own}, {record.caption}" for own, record in zip(("dull", "grey"), records, strict=True)]
    expected = avoiding(twin, texts, [5, 6, 11, 12], num_images_per_prompt=2)
    assert pixels(image for record in records for image in record.images) == pixels(expected)


def test_an_empty_negative_prompt_is_not_none():
    """SDXL has zeros for no negative prompt, in the negative image and in the final run."""
    pipe, twin = tiny.sdxl(), tiny.sdxl()
    for each in (pipe, twin):
        each.register_to_config(force_zeros_for_empty_prompt=True)
    records = prompting(pipe, negative_prompt="")
    texts = [record.caption for record in records]
    got = pixels(record.images[0] for record in records)
    assert got == pixels(avoiding(twin, texts, negative_prompt=""))
    assert got != pixels(avoiding(twin, texts))


@pytest.mark.parametrize("builder", BUILDERS)
def test_beside_other_methods(builder, caplog):
    """They act in the final run and stay; CADS may stand beside it on FLUX, whose final run has no second call."""
    cads = CADS(tau1=0.1, tau2=1.0)
    pipe, twin = negengine.apply(tiny.BUILDERS[builder](), cads), negengine.apply(tiny.BUILDERS[builder](), cads)
    with caplog.at_level(logging.INFO, logger="negengine"):
        records = prompting(pipe)
    assert pixels(record.images[0] for record in records) == pixels(avoiding(twin, [record.caption for record in records]))
    assert negengine.status(pipe) == negengine.status(twin)
    assert negengine.status(pipe)[CADS].active_steps
    assert [record.getMessage().split(" on ")[0] for record in caplog.records if record.name == "negengine"] == ["CADS", "NAG"]


@pytest.mark.parametrize(
    "builder, prepare, arguments, message",
    [
        ("flux", None, {"guidance": None}, r"at true_cfg_scale 1 .* which the negative image needs: give .*\(guidance=\.\.\.\)"),
        ("flux", None, {"guidance": 1.0}, "at true_cfg_scale 1 "),
        ("sd", None, {"avoid_with": NormalizedAttentionGuidance(blocks=("nowhere",))}, "no attention block .* is named 'nowhere'"),
        ("sd", NAG, {}, r"NAG is applied already.*negengine\.remove\(pipe, negengine\.NormalizedAttentionGuidance\)"),
        ("flux", "bare", {}, "methods are applied to the denoiser itself"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(builder, prepare, arguments, message):
    pipe = tiny.BUILDERS[builder]()
    if prepare == "bare":
        negengine.apply(tiny.denoiser(pipe), negengine.NegToMe(group_size=1, timesteps=(0, 1000)))
    elif prepare:
        negengine.apply(pipe, prepare)
    with tiny.watched(tiny.denoiser(pipe)) as calls, pytest.raises(ValueError, match=message):
        prompting(pipe, **arguments)
    assert not calls


def test_without_nag_the_error_names_it():
    settings = DiffusionNegativePrompt(captioner=words)
    with pytest.raises(ValueError, match=r"avoid_with=NormalizedAttentionGuidance\(\)"):
        negengine.diffusion_negative_prompting(tiny.flux(), PROMPTS, settings, seed=SEEDS, **CALL["flux"])


def test_settings_that_cannot_work():
    with pytest.raises(TypeError, match="avoid_with must be NormalizedAttentionGuidance or None, got NegativePrompting"):
        DiffusionNegativePrompt(captioner=words, avoid_with=NegativePrompting(prompt="the sea"))
    with pytest.raises(ValueError, match="NAG's negative_prompt will be the caption"):
        DiffusionNegativePrompt(captioner=words, avoid_with=NormalizedAttentionGuidance(negative_prompt="dull"))


def test_nag_is_taken_off_after_an_error():
    pipe = tiny.flux()
    tiny.draw(pipe)
    before, calls = state(pipe), []

    def callback(pipe, i, timestep, tensors):
        calls.append(i)
        if len(calls) > 2:  # in the final run
            raise RuntimeError("stop")
        return {}

    with pytest.raises(RuntimeError, match="stop"):
        prompting(pipe, callback_on_step_end=callback)
    assert state(pipe) == before
