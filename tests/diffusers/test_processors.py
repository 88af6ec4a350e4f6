"""Attention processors of others: where they may part the batch by rows, no method joins rows to it."""

import re
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from tiny import _parts, _quiet, attentions, denoiser, draw, flux, half_mask, picture, sd, sdxl, watched

import negengine
from negengine import (
    CADS,
    DynamicNegativeGuidance,
    NegativePrompting,
    NegToMe,
    NormalizedAttentionGuidance,
    ReferenceImage,
    SafeLatentDiffusion,
)

MERGE = {"timesteps": (0, 1000), "threshold": -1, "min_grid": 1}
GIVEN = ReferenceImage(picture(), half_mask())
REFUSED = r"joins rows .*, but the attention processor {} at '.*' and \d+ others may part .*: {}\.treats_rows_alone = True"


class Shared:
    """As StyleAligned has it: all images of a half attend to its first one, too."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rows = len(hidden_states)
        q, k, v = (
            x.view(rows, -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        if encoder_hidden_states is None:
            k, v = (torch.cat([x, x[:: rows // 2].repeat_interleave(rows // 2, 0)], 2) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


class Own(AttnProcessor2_0):
    """Of a user, and treats each row alone."""


class OwnOfFlux(FluxAttnProcessor):
    pass


def with_processors(pipe, kind, only=""):
    for name, module in attentions(denoiser(pipe)).items():
        if name.endswith(only):
            module.set_processor(kind())
    return pipe


def test_groups_beside_shared_attention():
    plain = draw(with_processors(sdxl(), Shared), 1, 3)
    assert not torch.equal(plain, draw(sdxl(), 1, 3))
    pipe = negengine.apply(with_processors(sdxl(), Shared), NegToMe(**MERGE, alpha=0.0))
    assert torch.equal(draw(pipe, 1, 3), plain)
    merged = draw(negengine.apply(pipe, NegToMe(**MERGE)), 1, 3)
    assert torch.equal(merged[0], plain[0])
    assert (merged[1:] - plain[1:]).abs().amax((1, 2, 3)).min() > 1e-2
    assert torch.equal(draw(negengine.remove(pipe), 1, 3), plain)


@pytest.mark.parametrize(
    "method",
    [
        NegToMe(**MERGE, reference=GIVEN),
        NegativePrompting(prompt="dull"),
        DynamicNegativeGuidance(prompt="dull", surrogate="ancestral"),
        SafeLatentDiffusion(prompt="dull"),
        NormalizedAttentionGuidance(negative_prompt="dull"),
    ],
    ids=lambda method: method.name,
)
def test_joined_rows_are_refused_before_the_first_step(method):
    """Silently, each image would see others than it should. Afterwards the pipeline is as before."""
    pipe = negengine.apply(with_processors(sdxl(), Shared), method)
    with watched(pipe.unet) as calls, pytest.raises(ValueError, match=REFUSED.format("Shared", "Shared")):
        draw(pipe, 1, 3)
    assert not calls
    assert negengine.status(pipe)[type(method)].stage == "failed"
    assert torch.equal(draw(negengine.remove(pipe), 1, 3), draw(with_processors(sdxl(), Shared), 1, 3))


def test_rows_that_a_callback_would_join_are_refused():
    pipe = negengine.apply(with_processors(sdxl(), Shared), CADS())

    def late(pipe, i, timestep, tensors):
        with pytest.raises(ValueError, match=REFUSED.format("Shared", "Shared")):
            negengine.apply(pipe, NegToMe(**MERGE, reference=GIVEN))
        return {}

    expected = draw(pipe, 1, 2)
    assert torch.equal(draw(pipe, 1, 2, callback_on_step_end=late), expected)


def test_nag_on_flux_is_refused():
    """There its rows are in the whole denoiser; on UNets in the attention to the text alone."""
    method = NormalizedAttentionGuidance(negative_prompt="dull")
    pipe = negengine.apply(with_processors(flux(), OwnOfFlux), method)
    with pytest.raises(ValueError, match=REFUSED.format("OwnOfFlux", "OwnOfFlux")):
        draw(pipe, 1, 2)
    pipe = negengine.apply(with_processors(sdxl(), Shared, only="attn1"), method)
    assert not torch.equal(draw(pipe, 1, 2), draw(with_processors(sdxl(), Shared, only="attn1"), 1, 2))
    assert negengine.status(pipe).active_steps


def test_a_processor_that_says_so_is_let_through(monkeypatch):
    """On its class, as for one that somebody else wrote."""
    methods = NegToMe(**MERGE, reference=GIVEN), NormalizedAttentionGuidance(negative_prompt="dull")
    expected = draw(negengine.apply(sdxl(), *methods), 1, 2)
    pipe = negengine.apply(with_processors(sdxl(), Own), *methods)
    with pytest.raises(ValueError, match="the attention processor Own at"):
        draw(pipe, 1, 2)
    monkeypatch.setattr(Own, "treats_rows_alone", True, raising=False)
    assert torch.equal(draw(pipe, 1, 2), expected)


@pytest.mark.parametrize("change", ["slices", "fused projections"])
def test_what_diffusers_ships_is_let_through(change):
    pipe = sdxl()
    pipe.enable_attention_slicing(1) if change == "slices" else pipe.fuse_qkv_projections()
    expected = draw(negengine.apply(sdxl(), NegToMe(**MERGE, reference=GIVEN)), 1, 2)
    torch.testing.assert_close(draw(negengine.apply(pipe, NegToMe(**MERGE, reference=GIVEN)), 1, 2), expected, rtol=1e-3, atol=1e-3)


def test_the_attention_of_perturbed_guidance_without_that_guidance():
    """Its processors part the batch; where its own pipeline has set them, joined rows stand part by part (test_pag.py)."""
    pipe = with_processors(sdxl(), diffusers.models.attention_processor.PAGIdentitySelfAttnProcessor2_0, only="attn1")
    negengine.apply(pipe, NegToMe(**MERGE, reference=GIVEN))
    with pytest.raises(ValueError, match="the attention processor PAGIdentitySelfAttnProcessor2_0 at"):
        draw(pipe, 1, 2)


def test_every_processor_of_diffusers_that_parts_the_batch_is_known():
    """A new version may bring others."""
    found = [
        part.split("(")[0].split(":")[0]
        for file in (Path(diffusers.__file__).parent / "models").rglob("*.py")
        for part in re.split(r"^class ", file.read_text(), flags=re.MULTILINE)[1:]
        if "Processor" in part.partition("\n")[0] and re.search(r"hidden_states\.chunk\([23]\)", part)
    ]
    assert "PAGCFGIdentitySelfAttnProcessor2_0" in found
    assert all(name.startswith("PAG") for name in found)


def text_to_video_zero(xl):
    if xl:
        pipe = _quiet(diffusers.TextToVideoZeroSDXLPipeline(**_parts(sdxl())))
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        return pipe
    parts = _parts(sd(), without=("image_encoder",))
    return _quiet(diffusers.TextToVideoZeroPipeline(**parts, requires_safety_checker=False))


@pytest.mark.parametrize("xl", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_text_to_video_zero(xl):
    """Its frames attend to the first one: groups and conditioning go beside that, joined rows do not."""

    def call(pipe):
        options = {"video_length": 3, "num_inference_steps": 4, "t0": 1, "t1": 2, "output_type": "latent"}
        return torch.as_tensor(pipe("a cat", height=64, width=64, generator=torch.Generator().manual_seed(2), **options).images)

    plain = call(text_to_video_zero(xl))
    pipe = negengine.apply(text_to_video_zero(xl), NegToMe(**MERGE))
    assert torch.equal(call(pipe), plain)
    assert not torch.equal(call(negengine.apply(text_to_video_zero(xl), CADS())), plain)
    pipe = negengine.apply(pipe, NegToMe(**MERGE, reference=GIVEN))
    with pytest.raises(ValueError, match="the attention processor CrossFrameAttnProcessor2_0 at"):
        call(pipe)
