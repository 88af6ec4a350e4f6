"""Perturbed attention guidance in its other pipelines, and methods that must tell conditional rows (test_pag has the rest)."""

import itertools

import diffusers
import pytest
import tiny_more
import torch
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0
from guards import guarded
from literal import Literal
from tiny import BUILDERS, _parts, _quiet, denoiser, draw, picture, sd, sdxl, watched
from tiny_beside import canvas

import negengine
from negengine import NegToMe

REST = pytest.mark.exhaustive
LAYERS = ["mid_block", "up_blocks.1"]
MERGE = {"timesteps": (0, 1000), "threshold": 0.6, "min_grid": 1}


def pag(name):
    """The pipeline of a name in diffusers, and what it is called with."""
    cls, call = getattr(diffusers, name), {"prompts": 1, "n": 2, "num_inference_steps": 2, "pag_scale": 3.0}
    if "XL" in name:
        parts, extra = _parts(BUILDERS["sdxl_controlnet" if "ControlNet" in name else "sdxl"]()), {"add_watermarker": False}
    else:
        parts, extra = _parts(sd(sample_size=64)), {"requires_safety_checker": False}
    if "Inpaint" in name:
        call |= canvas("sdxl")
    return _quiet(cls(**parts, pag_applied_layers=LAYERS, **extra)), call


class Merging:
    """Beside one of diffusers' two processors of PAG: the test's merge of what it returns, the perturbed rows with the others."""

    def __init__(self, processor, literal, names):
        self.processor, self.literal, self.names = processor, literal, names

    def __call__(self, attn, *args, **kwargs):
        return self.literal(self.processor(attn, *args, **kwargs), self.names[attn])


PIPELINES = [
    pytest.param("StableDiffusionXLPAGPipeline", 5.0),
    pytest.param("StableDiffusionXLPAGPipeline", 1.0, marks=REST),
    pytest.param("StableDiffusionXLPAGImg2ImgPipeline", 5.0, marks=REST),
    pytest.param("StableDiffusionXLPAGInpaintPipeline", 5.0, marks=REST),
    pytest.param("StableDiffusionXLControlNetPAGPipeline", 5.0, marks=REST),
    pytest.param("StableDiffusionPAGPipeline", 1.0),
]


@pytest.mark.parametrize("name, guidance", PIPELINES)
def test_as_merged_within_the_attention(name, guidance):
    """The parts of the batch are conditional, perturbed and, with guidance, unconditional: a group lies in one of them."""
    twin, call = pag(name)
    parts = 3 if guidance > 1 else 2
    settings = {"threshold": MERGE["threshold"], "blocks": ("up_blocks",), "halves": parts}
    literal = Literal(twin, 2, **settings)
    names = {module: path for path, module in twin.unet.named_modules()}
    plain, perturbed = PAGCFGIdentitySelfAttnProcessor2_0(), PAGIdentitySelfAttnProcessor2_0()
    processors = tuple(Merging(processor, literal, names) for processor in (plain, perturbed))
    twin.set_pag_applied_layers(LAYERS, pag_attn_processors=processors)
    for seed in range(20):
        literal.margin = 1.0
        expected = draw(twin, seed=seed, guidance_scale=guidance, **call)
        if literal.margin > 3e-7:
            break
    pipe, call = pag(name)
    unmerged = draw(pipe, seed=seed, guidance_scale=guidance, **call)
    negengine.apply(pipe, NegToMe(**MERGE))
    with watched(denoiser(pipe)) as calls:
        got = draw(pipe, seed=seed, guidance_scale=guidance, **call)
    assert {rows for _, rows in calls} == {2 * parts}
    assert not torch.equal(got, unmerged)
    assert torch.equal(got, expected)


TELLERS = {
    "CADS": negengine.CADS(),
    "seed variance": negengine.SeedVariance(),
    "guidance interval": negengine.GuidanceInterval(low=0.2, high=3.0),
    "NAG": negengine.NormalizedAttentionGuidance(negative_prompt="dull"),
    "negative prompting": negengine.NegativePrompting(prompt="dull"),
}


@pytest.mark.parametrize("guidance, name", guarded(itertools.product((1.0, 5.0), TELLERS), lambda guidance, name: guidance == 1.0))
def test_methods_that_must_tell_branches_are_refused(guidance, name):
    """The perturbed rows come last: without guidance, two parts look like its two halves. Nothing is left afterwards."""
    pipe, call = pag("StableDiffusionXLPAGPipeline")
    negengine.apply(pipe, TELLERS[name], NegToMe(**MERGE))
    with (
        watched(denoiser(pipe)) as calls,
        pytest.raises(ValueError, match=f"tell its branches apart; .* pag_scale, or {name}"),
    ):
        draw(pipe, guidance_scale=guidance, **call)
    assert not calls
    if guidance > 1:
        call = call | {"pag_scale": 0.0}
        expected = draw(negengine.apply(sdxl(), TELLERS[name], NegToMe(**MERGE)), prompts=1, n=2, num_inference_steps=2)
        torch.testing.assert_close(draw(pipe, guidance_scale=guidance, **call), expected, rtol=1e-3, atol=1e-3)


# --- Stable Diffusion 3, whose processors project the parts one by one -------------------------------------------


def pag_sd3():
    parts = _parts(tiny_more.sd3(), without=tiny_more.OPTIONAL)
    return _quiet(diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"]))


def draw_sd3(pipe, **call):
    return tiny_more.draw(pipe, **{"prompts": 1, "n": 2, "num_inference_steps": 2, "pag_scale": 3.0, **call})


@pytest.mark.parametrize("reference", ["first", pytest.param("picture", marks=REST)])
def test_its_blocks_of_stable_diffusion_3_are_refused(reference):
    """Before the first step; afterwards the pipeline is as it was."""
    pipe = pag_sd3()
    given = negengine.ReferenceImage(picture()) if reference == "picture" else reference
    negengine.apply(pipe, NegToMe(**MERGE, reference=given))
    with watched(denoiser(pipe)) as calls, pytest.raises(ValueError, match=r"perturbed attention .*'transformer_blocks\.1\.attn'"):
        draw_sd3(pipe)
    assert not calls
    own = negengine.apply(tiny_more.sd3(), NegToMe(**MERGE, reference=given))
    expected = tiny_more.draw(own, prompts=1, n=2, num_inference_steps=2)
    torch.testing.assert_close(draw_sd3(pipe, pag_scale=0.0), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(draw_sd3(negengine.remove(pipe)), draw_sd3(pag_sd3()))


@pytest.mark.parametrize("guidance, reference", guarded(itertools.product((1.0, 3.0), ("first", "picture")), lambda *c: c[0] > 1))
def test_the_other_blocks_of_stable_diffusion_3_are_merged(guidance, reference):
    """The first image of a group is as it was; a picture moves all, and one that is not avoided none."""
    plain = draw_sd3(pag_sd3(), guidance_scale=guidance)
    given = negengine.ReferenceImage(picture()) if reference == "picture" else reference
    blocks = ("transformer_blocks.0", "transformer_blocks.2")
    settings = {"timesteps": (0, 1000), "threshold": -1, "blocks": blocks, "reference": given}
    got = draw_sd3(negengine.apply(pag_sd3(), NegToMe(**settings)), guidance_scale=guidance)
    still = draw_sd3(negengine.apply(pag_sd3(), NegToMe(**settings, alpha=0.0)), guidance_scale=guidance)
    torch.testing.assert_close(still, plain, rtol=1e-4, atol=1e-4)
    moved = [not torch.allclose(a, b, atol=1e-2) for a, b in zip(got, plain, strict=True)]
    assert moved == [reference == "picture", True]
