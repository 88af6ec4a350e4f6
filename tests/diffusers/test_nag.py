"""Normalized attention guidance on pipelines, against the second attention written out in literal_nag.py."""

import dataclasses
import functools

import diffusers
import pytest
import torch
from compare_nag import AVOIDED, assert_close, assert_same, guide, report
from literal_nag import LiteralNag, encoded
from test_apply_remove import state
from test_families import TOY, Toy
from tiny import BUILDERS, NEGATIVES, denoiser, draw, flux, kind, sd, sdxl, watched

import negengine
from negengine import Embeddings, NormalizedAttentionGuidance
from negengine.diffusers import families

KINDS = pytest.mark.parametrize("builder", ["flux", "sdxl", "sd"])
# where nothing is of the family but that it is a UNet
SOME_KINDS = pytest.mark.parametrize("builder", ["flux", pytest.param("sdxl", marks=pytest.mark.exhaustive), "sd"])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# --- the mathematics and its place -------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("builder", [sdxl, sd])
def test_unets(builder, guidance_scale):
    call = functools.partial(draw, guidance_scale=guidance_scale)
    pipe = assert_same(builder, call)
    assert (report(pipe).blocks, report(pipe).active_steps) == (10 if builder is sdxl else 6, 3)


@pytest.mark.parametrize("overrides", [{}, {"guidance_embeds": False}], ids=["distilled", "few-step"])
def test_flux(overrides):
    pipe = assert_same(functools.partial(flux, **overrides))
    assert (report(pipe).blocks, report(pipe).active_steps) == (4, 3)


BLOCKS = [
    (flux, ("transformer_blocks.1",), 1),
    (flux, ("transformer_blocks",), 2),
    (flux, ("single_transformer_blocks",), 2),
    (sdxl, ("up_blocks",), 6),
    (sd, ("mid_block", "down_blocks"), 2),
]


@pytest.mark.parametrize("builder, blocks, number", BLOCKS)
def test_blocks(builder, blocks, number):
    assert report(assert_same(builder, blocks=blocks)).blocks == number


@pytest.mark.parametrize("builder, window", [(flux, (500, 1000)), (flux, (0, 900)), (sdxl, (600, 1000)), (sd, (0, 400))])
def test_window(builder, window):
    done = report(assert_same(builder, timesteps=window))
    assert 0 < done.active_steps < done.steps == 3


@pytest.mark.parametrize("builder", [flux, sdxl])
def test_three_prompts_of_three_images(builder):
    assert_same(builder, functools.partial(draw, prompts=3, n=3), n=3, texts=("trees", "a wall", "the sky"))


@pytest.mark.parametrize("builder, size", [(flux, (48, 144)), (sdxl, (40, 104)), (sd, (88, 24))])
def test_odd_sizes(builder, size):
    assert_same(builder, functools.partial(draw, height=size[0], width=size[1]))


@pytest.mark.parametrize("length", [5, 20])
def test_text_length_is_that_of_the_call(length):
    assert_same(flux, functools.partial(draw, max_sequence_length=length), length=length)


def test_one_image():
    """One row without classifier-free guidance: nothing can be mistaken for a row by its number."""
    for builder in (flux, sdxl):
        assert_same(builder, functools.partial(draw, prompts=1, n=1, guidance_scale=1.0), n=1, texts=("trees",))


def test_guidance_that_ends_mid_run():
    """A callback that turns classifier-free guidance off halves the batch: then all rows are conditional."""

    def end_guidance(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0
            tensors = {name: value.chunk(2)[-1] for name, value in tensors.items() if name != "latents"}
        return tensors

    inputs = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    assert_same(sdxl, functools.partial(draw, callback_on_step_end=end_guidance, callback_on_step_end_tensor_inputs=inputs))


@KINDS
def test_defaults_are_those_of_the_family(builder):
    scale, tau, alpha = {"flux": (5, 2.5, 0.25), "sdxl": (5, 2.5, 0.5), "sd": (5, 2.5, 0.38)}[builder]
    pipe, twin = BUILDERS[builder](), BUILDERS[builder]()
    negengine.apply(pipe, NormalizedAttentionGuidance(negative_prompt="trees"))
    got, plain = draw(pipe), draw(twin)
    LiteralNag(twin, encoded(twin, ["trees", "trees"], 2), 2, scale, tau, alpha)
    assert_close(got, draw(twin), plain)


# --- prompts -----------------------------------------------------------------------------------------------------


@SOME_KINDS
def test_one_prompt_for_all_is_that_for_each(builder):
    pipe = BUILDERS[builder]()
    one, each = draw(guide(pipe, "trees")), draw(guide(pipe, ["trees", "trees"]))
    assert torch.equal(one, each)
    assert not torch.equal(one, draw(guide(pipe, "a brick wall")))


@KINDS
def test_embeddings(builder):
    pipe = BUILDERS[builder]()
    expected = draw(guide(pipe))
    pooled = torch.randn(2, 32) if builder != "sd" else None  # of no use to NAG
    given = Embeddings(encoded(pipe, list(AVOIDED), 1), pooled)  # a pipeline may encode prompts between its runs
    assert torch.equal(draw(guide(pipe, given)), expected)


@SOME_KINDS
def test_a_second_call_with_other_prompts(builder):
    """Nothing of the first call, of more images, stays."""
    pipe, fresh = guide(BUILDERS[builder](), "trees"), guide(BUILDERS[builder](), "trees")
    draw(pipe, prompts=3, n=3, num_inference_steps=2)
    assert torch.equal(draw(pipe, prompts=1, n=2), draw(fresh, prompts=1, n=2))
    assert report(pipe) == report(fresh)


# --- nothing more than asked -------------------------------------------------------------------------------------


@SOME_KINDS
@pytest.mark.parametrize("settings", [{"scale": 1}, {"alpha": 0}], ids=str)
def test_what_guides_nothing_costs_nothing(builder, settings):
    pipe = BUILDERS[builder]()
    plain = draw(pipe)
    guide(pipe, **settings)
    with watched(denoiser(pipe)) as calls, attended(pipe) as rows:
        assert torch.equal(draw(pipe), plain)
    assert {number for _, number in calls} == rows == {8 if builder != "flux" else 4}
    assert report(pipe).active_steps == 0
    assert "guides nothing; raise it" in str(report(pipe))


class attended:
    """A set that fills with the numbers of rows that cross-attentions (FLUX: attentions) look at the text with."""

    def __init__(self, pipe):
        self.rows, self.hooks = set(), []
        for name, module in denoiser(pipe).named_modules():
            if name.endswith(("attn2.to_k", "attn.to_k")):
                self.hooks.append(module.register_forward_pre_hook(lambda module, args: self.rows.add(len(args[0]))))

    def __enter__(self):
        return self.rows

    def __exit__(self, *error):
        [hook.remove() for hook in self.hooks]


@SOME_KINDS
def test_a_window_that_no_step_hits(builder):
    pipe = BUILDERS[builder]()
    plain = draw(pipe)
    guide(pipe, timesteps=(2, 3))
    assert torch.equal(draw(pipe), plain)
    assert "widen `timesteps`" in report(pipe).idle_reason


@SOME_KINDS
def test_nothing_remains(builder):
    pipe = BUILDERS[builder]()
    plain, before = draw(pipe), state(pipe)
    guide(pipe)
    assert not torch.equal(draw(pipe), plain)
    negengine.remove(pipe, NormalizedAttentionGuidance)
    assert state(pipe) == before
    assert torch.equal(draw(pipe), plain)


@SOME_KINDS
def test_steps_before_the_window_are_unchanged(builder):
    """Their latents bit for bit."""
    pipe = BUILDERS[builder]()

    def first(pipe):
        seen = []
        draw(pipe, callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors["latents"].clone()) or {})
        return seen

    plain = first(pipe)
    guided = first(guide(pipe, timesteps=(0, 400 if builder == "sd" else 700)))
    assert torch.equal(guided[0], plain[0])
    assert not torch.equal(guided[-1], plain[-1])


def test_rows_of_flux():
    """A second row per image, in active steps alone."""
    pipe = guide(flux(), timesteps=(900, 1000))
    with watched(pipe.transformer) as calls:
        draw(pipe)
    assert [rows for _, rows in calls] == [8, 4, 4]


@pytest.mark.parametrize("builder", [sdxl, sd])
def test_rows_of_unets(builder):
    """One further attention of the conditional rows in cross-attention; the unconditional ones come out as before."""
    pipe, seen = builder(), {}

    def keep(name, end):
        def hook(module, args, *output):
            seen.setdefault((name, end), (output or args)[0].clone())

        return hook

    def run():
        seen.clear()
        hooks = []
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn2"):
                hooks += [
                    module.to_k.register_forward_pre_hook(keep(name, "text")),
                    module.register_forward_hook(keep(name, "output")),
                ]
            if name.endswith("attn1"):
                hooks.append(module.register_forward_hook(keep(name, "output")))
        draw(pipe)
        [hook.remove() for hook in hooks]
        return dict(seen)

    plain = run()
    guide(pipe)
    guided = run()
    text = encoded(pipe, list(AVOIDED), 2)
    for (name, end), value in guided.items():
        before = plain[name, end]
        assert len(value) == (12 if end == "text" else 8), name
        if end == "text":
            assert torch.equal(value[:8], before)
            assert torch.equal(value[8:], text)
        else:
            torch.testing.assert_close(value[:4], before[:4], rtol=1e-4, atol=1e-4)
    first = ("down_blocks.1.attentions.0.transformer_blocks.0.attn2", "output")
    assert not torch.allclose(guided[first][4:], plain[first][4:], rtol=1e-2, atol=1e-2)


# --- bad input ---------------------------------------------------------------------------------------------------


@SOME_KINDS
def test_a_bare_denoiser(builder):
    with pytest.raises(
        ValueError, match="NAG encodes its negative prompt as the pipeline encodes its prompts; apply it to the pipe"
    ):
        guide(denoiser(BUILDERS[builder]()))


class ToyPipeline:
    def __init__(self):
        self.transformer = Toy()


def test_a_family_that_does_not_tell_how_prompts_are_encoded():
    with families.registered(TOY), pytest.raises(ValueError, match="Toy does not tell how its pipelines encode prompts"):
        guide(ToyPipeline())


def test_a_family_without_defaults():
    told = dataclasses.replace(TOY.conditioning, prompts=lambda encoded: {"encoder_hidden_states": encoded[0]})
    family = dataclasses.replace(TOY, conditioning=told)
    with families.registered(family), pytest.raises(ValueError, match="Toy has no defaults for NAG; give scale, alpha"):
        negengine.apply(ToyPipeline(), NormalizedAttentionGuidance(negative_prompt="trees", tau=2))


@KINDS
def test_unknown_blocks(builder):
    with pytest.raises(ValueError, match=r"no attention block of this .* denoiser is named 'middle'; there are"):
        guide(BUILDERS[builder](), blocks=("middle",))


def refused(pipe, message, **kwargs):
    with watched(denoiser(pipe)) as calls, pytest.raises(ValueError, match=message):
        draw(pipe, **kwargs)
    assert not calls


def test_true_guidance_of_flux():
    """An error that says what to do; with a scale of 1 there is nothing to refuse."""
    pipe, true = flux(), {"true_cfg_scale": 2.5, "negative_prompt": NEGATIVES[:2]}
    plain = draw(pipe, **true)
    refused(guide(pipe), "pass true_cfg_scale=1 and no negative_prompt, and give NormalizedAttentionGuidance", **true)
    draw(pipe)
    assert torch.equal(draw(guide(pipe, scale=1), **true), plain)


@SOME_KINDS
def test_a_wrong_number_of_prompts(builder):
    pipe = guide(BUILDERS[builder](), ["trees", "walls", "skies"])
    refused(pipe, "3 prompts to avoid, but this call has 2; give one, or one for each")


def test_rows_that_are_neither_halves_nor_one_per_image():
    parts = sdxl(in_channels=8).components
    del parts["image_encoder"], parts["feature_extractor"]
    pipe = diffusers.StableDiffusionXLInstructPix2PixPipeline(**parts, add_watermarker=False)
    with pytest.raises(
        ValueError, match=r"NAG must know which rows .* and cannot on StableDiffusionXLInstructPix2PixPipeline: it guides by"
    ):
        guide(pipe, "trees")


def test_the_report_says_what_was_done():
    pipe = guide(sd())
    assert str(report(pipe)) == "NAG on Stable Diffusion 1.x and 2.x: applied, not run yet"
    draw(pipe)
    assert str(report(pipe)) == "NAG on Stable Diffusion 1.x and 2.x: guided 6 blocks in 3 of 3 steps"
    assert kind(pipe) == "sd"
