"""Prompt embeddings of a user's own, of one row for several images."""

import pytest
import torch
from tiny import SIZE, flux, picture, sdxl

import negengine

MERGE = {"timesteps": (0, 1000), "threshold": -1, "min_grid": 1}
FLUX = {**SIZE["flux"], "num_inference_steps": 2, "output_type": "latent", "max_sequence_length": 11, "num_images_per_prompt": 4}
METHODS = {
    "NegToMe": lambda: negengine.NegToMe(**MERGE),
    "with a group": lambda: negengine.NegToMe(**MERGE, group_size=2),
    "a picture": lambda: negengine.NegToMe(**MERGE, reference=negengine.ReferenceImage(picture())),
    "NAG": lambda: negengine.NormalizedAttentionGuidance(negative_prompt="a dog", timesteps=(0, 1000)),
    "CADS": lambda: negengine.CADS(),
    "DNG": lambda: negengine.NegativePrompting(prompt="a dog", scale=3.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_one_row_stands_for_all_images_of_flux(name):
    """As a Redux prior gives it."""
    latents = torch.randn(4, 35, 16, generator=torch.Generator().manual_seed(0))
    expected = negengine.apply(flux(), METHODS[name]())("a cat", latents=latents, **FLUX).images
    pipe = flux()
    text, pooled, _ = pipe.encode_prompt("a cat", max_sequence_length=11, device="cpu")
    plain = pipe(prompt_embeds=text, pooled_prompt_embeds=pooled, latents=latents, **FLUX).images
    negengine.apply(pipe, METHODS[name]())
    found = pipe(prompt_embeds=text, pooled_prompt_embeds=pooled, latents=latents, **FLUX).images
    assert not torch.allclose(found, plain, atol=1e-3)
    if name != "CADS":  # whose noise is drawn for each row of the text
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sdxl_repeats_them():
    pipe = sdxl()
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    encoded = pipe.encode_prompt("a cat", negative_prompt="dull", device="cpu", do_classifier_free_guidance=True)
    given = dict(zip(names, encoded, strict=True))
    call = {**SIZE["sdxl"], "num_inference_steps": 2, "output_type": "latent", "num_images_per_prompt": 3}
    latents = torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(0))
    negengine.apply(pipe, negengine.NegToMe(**MERGE))
    expected = pipe("a cat", negative_prompt="dull", latents=latents, **call).images
    assert torch.equal(pipe(**given, latents=latents, **call).images, expected)
