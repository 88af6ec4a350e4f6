"""Perturbed attention guidance, whose processors part the batch into equal pieces."""

import pytest
import torch
from diffusers import StableDiffusionXLPAGPipeline
from literal_release import encoded
from PIL import Image
from tiny import _parts, _quiet, draw, picture, sdxl, watched

import negengine

MERGE = {"timesteps": (0, 1000), "threshold": -1, "min_grid": 1}


def pag():
    layers = ["mid_block", "up_blocks.1"]
    return _quiet(StableDiffusionXLPAGPipeline(**_parts(sdxl()), pag_applied_layers=layers, add_watermarker=False))


def call(pipe, scale=3.0):
    return draw(pipe, prompts=1, n=4, pag_scale=scale)


def test_groups_are_merged():
    plain = call(pag())
    merged = call(negengine.apply(pag(), negengine.NegToMe(**MERGE)))
    torch.testing.assert_close(merged[0], plain[0], rtol=1e-4, atol=1e-4)
    assert all(not torch.allclose(merged[i], plain[i], atol=1e-2) for i in (1, 2, 3))


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_a_picture_that_is_not_avoided_changes_nothing(guidance):
    """Its rows stand in each of the parts, of which there are two without classifier-free guidance."""
    call = {"prompts": 1, "n": 2, "pag_scale": 3.0, "guidance_scale": guidance}
    pipe = negengine.apply(pag(), negengine.NegToMe(**MERGE, alpha=0.0, reference=negengine.ReferenceImage(picture())))
    with watched(pipe.unet) as calls:
        got = draw(pipe, **call)
    assert {rows for _, rows in calls} == {3 * (2 + (guidance > 1))}
    torch.testing.assert_close(got, draw(pag(), **call), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_a_picture_is_avoided_as_an_image_of_the_batch_would_be(guidance, compiled):
    """Another pipeline draws the picture in the place of image 0 of each part, and that is what the others avoid."""
    given, call = picture(), {"prompts": 1, "pag_scale": 3.0, "guidance_scale": guidance}
    latents = torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(0))
    twin = pag()
    clean = encoded(twin, given.resize((56, 72), Image.Resampling.LANCZOS))

    def place(module, args):
        scale = 1 / (twin.scheduler.sigmas[twin.scheduler.step_index or 0] ** 2 + 1) ** 0.5
        sample = args[0].clone()
        sample[::3] = clean * scale
        return (sample, *args[1:])

    twin.unet.register_forward_pre_hook(place)
    negengine.apply(twin, negengine.NegToMe(**MERGE))
    expected = draw(twin, n=3, latents=latents, **call)[1:]
    pipe = negengine.apply(pag(), negengine.NegToMe(**MERGE, reference=negengine.ReferenceImage(given, noise=False)))
    if compiled:
        torch._dynamo.reset()
        pipe.unet.compile(backend="eager", fullgraph=True)
    got = draw(pipe, n=2, latents=latents[1:], **call)
    assert negengine.status(pipe).merged_tokens
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(got, draw(pag(), n=2, latents=latents[1:], **call), atol=1e-1)


def test_methods_that_must_tell_branches_are_refused_before_the_first_step():
    """Without PAG's scale the same pipeline takes them, and afterwards it is as before."""
    pipe = negengine.apply(pag(), negengine.NegativePrompting(prompt="a dog", scale=0.0))
    with pytest.raises(ValueError, match="no method can tell its branches apart; leave out pag_scale, or"):
        call(pipe)
    torch.testing.assert_close(call(pipe, 0.0), call(pag(), 0.0), rtol=1e-4, atol=1e-3)
    negengine.remove(pipe)
    assert torch.equal(call(pipe), call(pag()))
