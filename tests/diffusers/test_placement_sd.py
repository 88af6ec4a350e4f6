"""On Stable Diffusion 1.x and 2.x, NegToMe gives bit for bit what it gives on SDXL's U-Net: the published placement."""

import functools

import diffusers
import pytest
import torch
from compare import assert_same
from tiny import denoiser, draw, sd

import negengine


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["guided", "unguided"])
def test_two_prompts_of_three_images(guidance_scale):
    call = functools.partial(draw, prompts=2, n=3, guidance_scale=guidance_scale)
    status = assert_same("sd", call, 3, guided=guidance_scale > 1, reference="others", threshold=0.5)
    assert (status.family, status.group_size) == ("Stable Diffusion 1.x and 2.x", 3)


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline"])
def test_its_pipelines(name):
    pipe = getattr(diffusers, name)(**sd(sample_size=64).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe)
    negengine.apply(pipe, negengine.NegToMe(threshold=-1, timesteps=(0, 1000), min_grid=1))
    assert not torch.equal(draw(pipe), plain)
    assert torch.equal(draw(negengine.remove(pipe)), plain)


def test_a_unet_that_takes_more_is_not_taken_for_it():
    """Class labels or image embeddings belong to other models."""
    unet = diffusers.UNet2DConditionModel.from_config(denoiser(sd()).config, class_embed_type="timestep")
    with pytest.raises(TypeError, match="does not know UNet2DConditionModel"):
        negengine.apply(unet, negengine.NegToMe(group_size=2, timesteps=(0, 1000)))
