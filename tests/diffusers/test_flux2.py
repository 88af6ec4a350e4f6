"""What is FLUX.2's own: projections that attention and MLP share, and images beside the one that is drawn."""

import functools

import pytest
import torch
from compare import assert_same, hooked
from guards import guarded
from literal_branches import Guided, text_inputs
from test_methods_joint import LIVELY, LONG, calm, pushed
from tiny import denoiser, half_mask, picture, watched
from tiny_flux2 import TEXT, dev, klein
from tiny_more import SIZE, against, draw, words

import negengine
from negengine import (
    CADS,
    DynamicNegativeGuidance,
    NegativePrompting,
    NegToMe,
    NormalizedAttentionGuidance,
    ReferenceBank,
    ReferenceImage,
    reference,
)
from negengine.methods import DiffusionNegativePrompt

EVERYWHERE = {"timesteps": (0, 1000)}
TOKENS, TEXT_TOKENS, CHANNELS = 35, 17, 32
BESIDE = [picture(7, (64, 64)), picture(8, (64, 96))]  # 4 x 4 and 6 x 4 tokens
SINGLE = "single_transformer_blocks.1"


def before_and_after(pipe, method, call, path=f"{SINGLE}.attn.to_out"):
    """What a projection is called with, as the block made it and as the method leaves it, in one step."""
    seen = []
    module = denoiser(pipe).get_submodule(path)
    listen = functools.partial(module.register_forward_pre_hook, lambda module, args: seen.append(args[0].clone()))
    listen()
    negengine.apply(pipe, method)
    listen()
    call(pipe, num_inference_steps=1)
    return seen


def split(x):
    """Of a single block's projection: text, the image's own tokens, those of other images, and the MLP's channels."""
    return *x[..., :CHANNELS].tensor_split([TEXT_TOKENS, TEXT_TOKENS + TOKENS], 1), x[..., CHANNELS:]


@pytest.mark.parametrize("beside", [None, BESIDE], ids=["alone", "beside others"])
def test_a_single_block_gives_what_the_mathematics_says(beside):
    """The attention's channels of the image's own tokens are merged, and nothing else."""
    method = NegToMe(**EVERYWHERE, blocks=(SINGLE,), threshold=0.85, alpha=0.8, reference="others")
    before, after = before_and_after(klein(), method, functools.partial(draw, n=3, image=beside))
    (text, own, others, mlp), (text_after, own_after, others_after, mlp_after) = split(before), split(after)
    expected = reference.negtome_batch(own, reference.group_references("others", 6, 3), 0.8, 0.85)
    assert 0 < (expected != own).any(-1).sum() < 6 * TOKENS
    torch.testing.assert_close(own_after, expected, rtol=1e-6, atol=1e-6)
    for now, then in ((text_after, text), (others_after, others), (mlp_after, mlp)):
        assert torch.equal(now, then)
    assert others.shape[1] == (40 if beside else 0)


# --- images beside the one that is drawn -------------------------------------------------------------------------


@pytest.mark.parametrize("builder", guarded([("flux2",), ("flux2_dev",)], lambda builder: builder == "flux2"))
def test_tokens_of_other_images_are_left_alone(builder):
    assert_same(builder, functools.partial(draw, n=3, image=BESIDE), 3, reference="others")


@pytest.mark.exhaustive
def test_a_call_without_them_may_follow():
    pipe, fresh = klein(), klein()
    hooked(pipe, functools.partial(draw, image=BESIDE), **EVERYWHERE)
    expected, _ = hooked(fresh, draw, **EVERYWHERE)
    assert torch.equal(draw(pipe), expected)


def test_reference_pictures_beside_them():
    """The rows of reference pictures have the other images' tokens too, and these are no reference."""
    method = NegToMe(
        **EVERYWHERE, blocks=(SINGLE,), threshold=0.3, alpha=0.8, reference=ReferenceImage(picture(), mask=half_mask())
    )
    before, after = before_and_after(klein(), method, functools.partial(draw, image=BESIDE))
    allowed = (
        torch.arange(TOKENS) % 7 < 3
    )  # of 50 pixels the left 25, so that the middle of the fourth column is the first black one
    own, own_after = split(before)[1], split(after)[1]
    assert len(own) == 4 + 2
    changed = 0
    for row in range(4):
        expected = reference.negtome(own[row], own[4 + row // 2], 0.8, 0.3, allowed, "paper")
        torch.testing.assert_close(own_after[row], expected, rtol=1e-6, atol=1e-6)
        changed += (expected != own[row]).any(-1).sum().item()
    assert changed > 0
    assert torch.equal(own_after[4:], own[4:])
    assert torch.equal(split(after)[2], split(before)[2])


def test_rows_of_reference_pictures_do_not_change_the_others():
    """They are drawn with the same images beside them."""
    pipe, call, beside = klein(), functools.partial(draw, image=BESIDE), []
    plain = call(pipe)
    settings = {**EVERYWHERE, "threshold": -1, "reference": ReferenceImage(picture())}
    nothing, _ = hooked(pipe, call, alpha=0.0, **settings)
    note = lambda module, args, inputs: beside.append(inputs["hidden_states"][:, TOKENS:])  # noqa: E731
    denoiser(pipe).register_forward_pre_hook(note, with_kwargs=True)
    changed, _ = hooked(pipe, call, alpha=0.9, **settings)
    assert all(torch.equal(tokens, tokens[:1].expand(6, 40, 16)) for tokens in beside)
    assert len(beside) == 3
    scale = (changed - plain).abs().max().item()
    assert scale > 1e-2
    torch.testing.assert_close(nothing, plain, rtol=0, atol=scale / 100)


@pytest.mark.parametrize("method", [NegativePrompting(prompt=LONG, scale=2.0), DynamicNegativeGuidance(prompt=LONG, **LIVELY)])
def test_guidance_beside_them(method):
    """DNG's posterior is that of the image's own tokens."""
    dynamic = isinstance(method, DynamicNegativeGuidance)
    report, literal = pushed("flux2", method, dynamic=dynamic, image=BESIDE)
    if dynamic:
        torch.testing.assert_close(torch.tensor(report.p, dtype=torch.float64), torch.stack(literal.history), rtol=1e-6, atol=1e-9)


def test_normalized_attention_guidance_beside_them():
    """Each of the two rows keeps its own tokens of the other images, as it keeps its own text."""
    settings = {"scale": 4.0, "tau": 1.5, "alpha": 0.6}
    pipe, twin = calm("flux2"), calm("flux2")
    plain = draw(pipe, image=BESIDE)
    literal = Guided(twin, text_inputs(twin, [LONG] * 2, 2), **settings)
    got = draw(negengine.apply(pipe, NormalizedAttentionGuidance(negative_prompt=LONG, **settings)), image=BESIDE)
    expected = draw(twin, image=BESIDE)
    assert 0 < literal.clamped < literal.tokens
    assert (got - plain).abs().max() > 1e-2
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_a_bank_is_recorded_without_them(tmp_path):
    pipe, call = klein(), {**SIZE["flux2"], **TEXT, "num_inference_steps": 3, "guidance_scale": 1.0}
    method = NegToMe(**EVERYWHERE, threshold=0.3, reference=ReferenceImage(picture()))
    with pytest.raises(ValueError, match="calls with images beside the one that is drawn, are not supported"):
        negengine.record_bank(pipe, method, tmp_path / "bank", prompt="a cat", image=BESIDE, **call)
    bank = negengine.record_bank(pipe, method, tmp_path / "bank", prompt="a cat", **call)
    assert isinstance(bank, ReferenceBank)
    run = functools.partial(draw, prompts=1)
    recorded, _ = hooked(pipe, run, **EVERYWHERE, reference=bank)
    joined, _ = hooked(pipe, run, **EVERYWHERE, reference=ReferenceImage(picture()))
    torch.testing.assert_close(recorded, joined, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(recorded, run(negengine.remove(pipe)), atol=1e-2)


# --- latents, prompts, guidance ----------------------------------------------------------------------------------


def test_latents_of_the_callers_own_tell_their_size():
    """With no height and width a call is for 128 x 128 latents, whatever latents it gets."""
    latents = torch.randn(4, 16, 5, 7, generator=torch.Generator().manual_seed(3))
    given = NegToMe(**EVERYWHERE, threshold=0.3, reference=ReferenceImage(picture(), mask=half_mask()))
    call = functools.partial(draw, latents=latents)
    sized, unsized = (call(negengine.apply(dev(), given), **size) for size in ({}, {"height": None, "width": None}))
    assert torch.equal(sized, unsized)


@pytest.mark.parametrize("guidance_scale", guarded([(1.0,), (4.0,)], lambda scale: scale == 4))
def test_distilled_models_are_served_at_any_scale(guidance_scale):
    method, call = NormalizedAttentionGuidance(negative_prompt=LONG), {"guidance_scale": guidance_scale}
    for pipe in (klein(is_distilled=True), dev()):
        plain = draw(pipe, **call)
        with watched(denoiser(pipe)) as calls:
            got = draw(negengine.apply(pipe, method), **call)
        assert [rows for _, rows in calls] == [8] * 3
        assert not torch.allclose(got, plain, atol=1e-3)


def test_cads_in_both_calls():
    guided, pipe = functools.partial(draw, guidance_scale=2.0), klein()
    plain = guided(pipe)
    assert not torch.allclose(guided(negengine.apply(pipe, CADS(unconditional=True))), plain, atol=1e-2)


def test_negative_prompts_of_several_images():
    """DNP gives klein, which takes no negative prompt as text, the caption's embedding."""
    pipe, twin = klein(), klein()
    call = {**SIZE["flux2"], **TEXT, "num_inference_steps": 2, "guidance_scale": 3.0}
    settings = DiffusionNegativePrompt(captioner=words)
    records = negengine.diffusion_negative_prompting(
        pipe, ["a cat", "two dogs"], settings, seed=[5, 11], num_images_per_prompt=2, **call
    )
    generator = [torch.Generator().manual_seed(seed) for seed in (5, 6, 11, 12)]
    negative = against(twin, [record.caption for record in records])
    final = twin(prompt=["a cat", "two dogs"], generator=generator, num_images_per_prompt=2, **negative, **call).images
    assert [image.tobytes() for record in records for image in record.images] == [image.tobytes() for image in final]


@pytest.mark.exhaustive
def test_dnp_avoids_the_caption_with_nag():
    settings = DiffusionNegativePrompt(captioner=words, avoid_with=NormalizedAttentionGuidance())
    call = {**SIZE["flux2"], **TEXT, "num_inference_steps": 2, "guidance_scale": 3.0}
    (record,) = negengine.diffusion_negative_prompting(klein(), "a cat", settings, seed=5, **call)
    method = NormalizedAttentionGuidance(negative_prompt=record.caption)
    twin = negengine.apply(klein(), method)
    call["guidance_scale"] = 1.0
    final = twin(prompt=["a cat"], generator=[torch.Generator().manual_seed(5)], **call).images
    assert record.images[0].tobytes() == final[0].tobytes()


@pytest.mark.parametrize("build", [dev, functools.partial(klein, is_distilled=True)], ids=["dev", "distilled klein"])
def test_without_a_negative_branch_there_is_no_negative_image(build):
    with pytest.raises(ValueError, match="has its guidance built in, so there is no negative branch"):
        negengine.diffusion_negative_image(build(), "a cat", seed=1, **SIZE["flux2"], **TEXT, guidance_scale=3.0)


def test_other_images_that_are_kept_as_keys_and_values_are_refused():
    pipe = klein()
    pipe.__class__ = type("Flux2KleinKVPipeline", (type(pipe),), {})
    with pytest.raises(TypeError, match="does not support Flux2KleinKVPipeline: from its second step on"):
        negengine.apply(pipe, NegToMe())
