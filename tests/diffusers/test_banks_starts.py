"""Recordings of runs that begin late or guide in their own way, which do what the joined picture does there."""

import contextlib

import diffusers
import pytest
import test_families_pixart as pixart
import tiny
import tiny_more
import tiny_z_image
import torch
from compare import THRESHOLD
from guards import guarded
from test_banks import no_step, pictures
from tiny import NEGATIVES, PROMPTS, _parts, _quiet, picture

import negengine
from negengine import NegToMe
from negengine.diffusers import families

SETTINGS = {"timesteps": (0, 1000), "threshold": THRESHOLD, "min_grid": 1}


def agrees(pipe, call, path, recorded=None, settings=SETTINGS):
    """What a bank does is what the joined picture does. ``recorded``: what the recording is given instead of the call's own.

    Returns the bank and the report of the run with it.
    """
    call = {"num_inference_steps": 3, **call}

    def draw(given=None):
        if given is not None:
            negengine.apply(pipe, NegToMe(**settings, reference=given))
        with torch.random.fork_rng():
            torch.manual_seed(2)  # pictures are encoded with random numbers of torch's own
            run = pipe(
                PROMPTS[0], num_images_per_prompt=2, output_type="latent", generator=torch.Generator().manual_seed(2), **call
            )
        return run.images, None if given is None else negengine.status(pipe)[NegToMe]

    plain, _ = draw()
    bank = negengine.record_bank(
        pipe, NegToMe(**settings, reference=pictures()), path, prompt=PROMPTS[0], **{**call, **(recorded or {})}
    )
    (joined, expected), (held, status) = draw(pictures()), draw(bank)
    negengine.remove(pipe)
    assert (status.merged_tokens, status.eligible_tokens) == (expected.merged_tokens, expected.eligible_tokens)
    assert status.merged_tokens > 0
    scale = (joined - plain).abs().amax().item()
    torch.testing.assert_close(held, joined, rtol=0, atol=scale * 1e-4)
    assert "recorded under this prompt" in status.bank
    return bank, status


def wide(**call):
    return {"image": picture(9, (112, 80)), "height": 80, "width": 112, "strength": 0.6, **call}


def small(**call):
    return {"image": picture(9, (56, 72)), "strength": 0.7, **call}


def sd_img2img():
    parts = _parts(tiny.sd(sample_size=64), without=("image_encoder",))
    return _quiet(diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False))


LATE = {
    "flux": (tiny.flux_img2img, wide(max_sequence_length=11)),
    "flux guided": (tiny.flux_img2img, wide(max_sequence_length=11, true_cfg_scale=2.0, negative_prompt=NEGATIVES[0])),
    "sdxl": (tiny.sdxl_img2img, small(negative_prompt=NEGATIVES[0])),
    "sdxl denoising_start": (tiny.sdxl_img2img, {"image": [torch.randn(1, 4, 9, 7)], "denoising_start": 0.4}),
    "sd, of DDIM": (sd_img2img, small(negative_prompt=NEGATIVES[0])),
    "sd3": (tiny_more.BUILDERS["sd3_img2img"], wide(**tiny_more.CALL["sd3"])),
    "qwen": (tiny_more.BUILDERS["qwen_img2img"], wide(**tiny_more.CALL["qwen"])),
    "z_image": (tiny_z_image.OWN["z_image_img2img"], wide(guidance_scale=0.0)),
    "z_image guided": (tiny_z_image.OWN["z_image_img2img"], wide(guidance_scale=2.0)),
}


@pytest.mark.parametrize("case", guarded([(case,) for case in LATE], lambda case: case in ("flux", "sdxl", "sd, of DDIM")))
def test_a_run_that_begins_late(case, tmp_path):
    build, call = LATE[case]
    bank, status = agrees(build(), call, tmp_path / "bank")
    assert len(bank.about.steps) == status.steps == status.active_steps < 3


@pytest.mark.parametrize("build", [tiny.sdxl_img2img, sd_img2img], ids=["told before", "told in the first step"])
def test_a_run_that_begins_behind_the_window(build, tmp_path):
    pipe = no_step(build())
    settings = NegToMe(**{**SETTINGS, "timesteps": (600, 1000)}, reference=pictures())
    with pytest.raises(ValueError, match=r"begins behind the window 600 .*; widen `timesteps`, or let the run"):
        negengine.record_bank(pipe, settings, tmp_path / "bank", prompt="a cat", num_inference_steps=3, **small(strength=0.4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("build", [tiny.sdxl_img2img, sd_img2img], ids=["told before", "told in the first step"])
def test_a_run_that_begins_earlier_than_the_recording(build, tmp_path):
    """It is refused before the denoiser is called, and a later one is served."""
    pipe = build()
    bank, _ = agrees(pipe, small(), tmp_path / "bank")
    negengine.apply(pipe, NegToMe(**SETTINGS, reference=bank))
    later = {"num_inference_steps": 3, "output_type": "latent", "num_images_per_prompt": 2}
    pipe(PROMPTS[0], **later, **small(strength=0.4))
    assert negengine.status(pipe).active_steps == negengine.status(pipe).steps == 1
    with pytest.raises(ValueError, match=r"this run merges at timestep .*, which .* does not hold"):
        no_step(pipe)(PROMPTS[0], **later, **small(strength=1.0))


# --- guidance ----------------------------------------------------------------------------------------------------

ENDED = {
    "lumina": (
        tiny_more.BUILDERS["lumina"],
        {**tiny_more.SIZE["lumina"], **tiny_more.CALL["lumina"], "guidance_scale": 3.0},
        {"cfg_trunc_ratio": 0.5},
    ),
    "z_image": (tiny_z_image.OWN["z_image"], {**tiny_z_image.SIZE, "guidance_scale": 3.0}, {"cfg_truncation": 0.4}),
}


@pytest.mark.parametrize("family", ENDED)
def test_guidance_that_ends_early(family, tmp_path):
    """It is recorded to the last step, so that the bank serves runs with it and without."""
    build, call, ended = ENDED[family]
    pipe = build()
    bank, _ = agrees(pipe, call | ended, tmp_path / "ended")
    whole, _ = agrees(pipe, call, tmp_path / "whole")
    assert bank.about == whole.about
    assert len(bank.about.branches) == 2


def gligen():
    parts = _parts(tiny.sd(attention_type="gated"), without=("image_encoder",))
    return _quiet(diffusers.StableDiffusionGLIGENPipeline(**parts, requires_safety_checker=False))


BOXES = {"height": 72, "width": 56, "gligen_phrases": ["x"], "gligen_boxes": [[0.1, 0.1, 0.5, 0.5]]}
UNTOLD = {
    "pixart": (
        pixart.pixart,
        {"height": 80, "width": 112, "use_resolution_binning": False, "max_sequence_length": 20},
        families.registered(pixart.PIXART),
    ),
    "gligen": (gligen, BOXES, contextlib.nullcontext()),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_pipelines_that_do_not_say_whether_they_guide(name, tmp_path):
    """What they ask of encode_prompt says it before the first step."""
    build, call, known = UNTOLD[name]
    with known:
        pipe = build()
        assert not hasattr(pipe, "do_classifier_free_guidance")
        guided, _ = agrees(pipe, call | {"guidance_scale": 3.0}, tmp_path / "guided")
        alone, _ = agrees(pipe, call | {"guidance_scale": 1.0}, tmp_path / "alone")
        assert guided.about.branches == ("unconditional", "conditional")
        assert alone.about.branches == ("conditional",)
        agrees(pipe, call | {"guidance_scale": 1.0}, tmp_path / "both", {"guidance_scale": 3.0})
        negengine.apply(no_step(pipe), NegToMe(**SETTINGS, reference=alone))
        pipe.prepare_latents = None  # it does not come so far
        with pytest.raises(ValueError, match="was recorded without classifier-free guidance, and this run guides"):
            pipe(PROMPTS[0], num_inference_steps=3, output_type="latent", guidance_scale=3.0, **call)
