"""Perturbed attention guidance, whose processors part the batch into equal pieces."""

import pytest
import torch
from diffusers import StableDiffusionXLPAGPipeline
from tiny import _parts, _quiet, draw, picture, sdxl

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


@pytest.mark.parametrize("name", ["picture", "DNG"])
def test_rows_cannot_join(name):
    """An error before the first step; without PAG's scale the same pipeline takes them, and afterwards it is as before."""
    methods = {
        "picture": negengine.NegToMe(**MERGE, alpha=0.0, reference=negengine.ReferenceImage(picture())),
        "DNG": negengine.NegativePrompting(prompt="a dog", scale=0.0),
    }
    pipe = negengine.apply(pag(), methods[name])
    with pytest.raises(ValueError, match="no method can join rows to it; leave out pag_scale, or"):
        call(pipe)
    torch.testing.assert_close(call(pipe, 0.0), call(pag(), 0.0), rtol=1e-4, atol=1e-3)
    negengine.remove(pipe)
    assert torch.equal(call(pipe), call(pag()))
