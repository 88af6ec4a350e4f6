"""Methods with a prompt of their own on Z-Image, beside branches written out as calls of their own."""

import functools

import pytest
import torch
from literal_z_image import Guided, Pushed
from tiny import NEGATIVES, PROMPTS, denoiser, watched
from tiny_more import words
from tiny_z_image import LONG, SIZE, draw, z_image

import negengine
from negengine import (
    CADS,
    DynamicNegativeGuidance,
    GuidanceInterval,
    NegativePrompting,
    NegToMe,
    NormalizedAttentionGuidance,
    SafeLatentDiffusion,
    SeedVariance,
)
from negengine.methods import DiffusionNegativePrompt

SHORT = "sea"  # filled up to half the tokens of LONG
GUIDED = {"guidance_scale": 1.5, "negative_prompt": NEGATIVES[:2]}
CALLS = pytest.mark.parametrize("call", [pytest.param({}, marks=pytest.mark.exhaustive), GUIDED], ids=["turbo", "guided"])
LIVELY = {"scale": 2.0, "prior": 0.3, "tau": 0.05, "delta": 1e-3, "p_max": 0.8, "surrogate": "ancestral"}
EVERYWHERE = {"timesteps": (0, 1000)}
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=2e-5)  # the pipeline keeps its latents in float32


def calm():
    """A denoiser in float64, with queries and keys that let differences of the last bit stay small."""
    pipe = z_image()
    for name, parameter in denoiser(pipe).named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            parameter.data.mul_(1 / 3)
    return pipe.to(torch.float64)


def pushed(method, call, dynamic=False):
    """Latents of ours and of the twin are those of the transcription. Returns the report and the transcription."""
    pipe, twin = calm(), calm()
    plain = draw(pipe, **call)
    literal = Pushed(twin, [method.prompt] * 2, 2, method, call.get("guidance_scale", 0.0), dynamic)
    got = draw(negengine.apply(pipe, method), **call)
    assert (got - plain).abs().max() > 1e-3
    close(got, draw(twin, **call))
    return negengine.status(pipe)[type(method)], literal


@CALLS
@pytest.mark.parametrize("text", [LONG, pytest.param(SHORT, marks=pytest.mark.exhaustive)], ids=["long", "short"])
def test_negative_prompting(text, call):
    pushed(NegativePrompting(prompt=text, scale=2.0), call)


def test_a_callback_may_change_the_guidance():
    """From the next step on."""
    pipe, twin, method = calm(), calm(), NegativePrompting(prompt=LONG, scale=2.0)
    literal = Pushed(twin, [LONG] * 2, 2, method)

    def lower(pipe, step, timestep, tensors):
        pipe._guidance_scale = literal.scale = 0.5
        return tensors

    got = draw(negengine.apply(pipe, method), callback_on_step_end=lower, **GUIDED)
    literal.scale = GUIDED["guidance_scale"]
    close(got, draw(twin, callback_on_step_end=lower, **GUIDED))


@CALLS
def test_dynamic_negative_guidance(call):
    report, literal = pushed(DynamicNegativeGuidance(prompt=LONG, **LIVELY), call, dynamic=True)
    history = torch.stack(literal.history)
    torch.testing.assert_close(torch.tensor(report.p, dtype=torch.float64), history, rtol=1e-4, atol=1e-7)
    assert (history[1] - history[0]).abs().max() > 1e-6


@CALLS
@pytest.mark.parametrize("text, tau", [(LONG, 3.5), pytest.param(SHORT, 2.0, marks=pytest.mark.exhaustive)], ids=["long", "short"])
def test_normalized_attention_guidance(text, tau, call):
    settings = {"scale": 4.0, "tau": tau, "alpha": 0.6}
    pipe, twin = calm(), calm()
    plain = draw(pipe, **call)
    literal = Guided(twin, [text] * 2, 2, **settings)
    got = draw(negengine.apply(pipe, NormalizedAttentionGuidance(negative_prompt=text, **settings)), **call)
    assert (got - plain).abs().max() > 1e-2
    close(got, draw(twin, **call))
    assert 0 < literal.clamped < literal.tokens


@pytest.mark.exhaustive
def test_nag_beside_negtome():
    """Both act; the unguided rows are merged first, and their push reaches the second rows."""
    pipe = z_image()
    alone = draw(negengine.apply(pipe, NegToMe(threshold=-1, **EVERYWHERE)))
    both = draw(negengine.apply(pipe, NormalizedAttentionGuidance(negative_prompt=LONG, scale=4.0, tau=1.5, alpha=0.6)))
    assert not torch.allclose(both, alone, atol=1e-2)
    status = negengine.status(pipe)
    assert status[NegToMe].merged_tokens == status[NegToMe].eligible_tokens > 0
    assert status[NormalizedAttentionGuidance].active_steps == 3
    assert torch.equal(draw(negengine.remove(pipe, NormalizedAttentionGuidance)), alone)


def test_a_prompt_for_each_prompt():
    pipe = calm()
    texts = ((SHORT, LONG), SHORT, LONG)
    each, one, other = (draw(negengine.apply(pipe, NegativePrompting(prompt=text, scale=2.0))) for text in texts)
    close(each[:2], one[:2])
    close(each[2:], other[2:])
    assert not torch.allclose(one, other, atol=1e-3)


def test_guidance_interval():
    pipe, twin = calm(), calm()
    original = twin.transformer.forward

    def forward(x, t, texts, **options):
        given = original(x, t, texts, return_dict=False)[0]
        noise = 1 - float(t[0])
        inside = 0.5 <= (noise / (1 - noise) if noise < 1 else float("inf")) <= 5
        return (given if inside else given[:4] * 2,)

    twin.transformer.forward = forward
    call = functools.partial(draw, num_inference_steps=5, **GUIDED)
    got = call(negengine.apply(pipe, GuidanceInterval(low=0.5, high=5.0)))
    assert 0 < negengine.status(pipe)[GuidanceInterval].active_steps < 5
    close(got, call(twin))


def test_safe_latent_diffusion():
    pipe = z_image()
    plain = draw(pipe, **GUIDED)
    paper = SafeLatentDiffusion(prompt=LONG, warmup=0, scale=30.0, threshold=0.5)
    assert not torch.allclose(draw(negengine.apply(pipe, paper), **GUIDED), plain, atol=1e-3)
    with pytest.raises(ValueError, match="guidance, which is off here; raise guidance_scale"):
        draw(pipe)


# --- the embedding -----------------------------------------------------------------------------------------------


def texts_seen(pipe, **call):
    """Of the first call of the denoiser."""
    seen = []
    hook = denoiser(pipe).register_forward_pre_hook(lambda module, args: seen.append([text.clone() for text in args[2]]))
    draw(pipe, **call)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("method", [CADS(scale=0.5), SeedVariance(**EVERYWHERE)], ids=["cads", "seed variance"])
def test_the_conditional_text_is_changed(method):
    """Not the other half; every token of a text, whatever else is in the batch; and the same in every run."""
    pipe = z_image()
    call = {"prompt": ["a cat", LONG], "guidance_scale": 1.5, "negative_prompt": [LONG, "dull"]}
    before, after = texts_seen(pipe, **call), texts_seen(negengine.apply(pipe, method), **call)
    assert all(torch.equal(b, a) for b, a in zip(before[4:], after[4:], strict=True))
    for b, a in zip(before[:4], after[:4], strict=True):
        assert a.shape == b.shape
        assert (a != b).any(-1).all()
    assert not torch.equal(after[0] - before[0], after[1] - before[1])  # images of one prompt differ
    assert all(torch.equal(a, b) for a, b in zip(after, texts_seen(pipe, **call), strict=True))


def test_cads_knows_a_text_by_its_own_tokens():
    """With psi at 1, its mean and deviation are those of the text alone, though a longer one stands in the batch."""
    pipe = z_image()
    call = {"prompt": ["a cat", LONG]}
    before, after = texts_seen(pipe, **call), texts_seen(negengine.apply(pipe, CADS(scale=0.5, psi=1.0)), **call)
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close([a.mean(), a.std()], [b.mean(), b.std()], rtol=1e-4, atol=1e-5)


def test_cads_of_both_halves():
    pipe = z_image()
    call = {"guidance_scale": 1.5, "negative_prompt": [LONG, "dull"]}
    before, after = texts_seen(pipe, **call), texts_seen(negengine.apply(pipe, CADS(scale=0.5, unconditional=True)), **call)
    assert all((a != b).any(-1).all() for b, a in zip(before, after, strict=True))


# --- diffusion-negative prompting --------------------------------------------------------------------------------


def test_diffusion_negative_prompting():
    """The negative image has the roles of the branches exchanged, and the final run avoids its caption."""
    pipe, twin = z_image(), z_image()
    call = {**SIZE, "num_inference_steps": 2, "guidance_scale": 1.5}
    seeds = [5, 11]
    settings = DiffusionNegativePrompt(captioner=words, guidance=0.8)
    records = negengine.diffusion_negative_prompting(pipe, PROMPTS[:2], settings, seed=seeds, **call)

    def drawn(texts, negatives, **other):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return twin([*texts], negative_prompt=[*negatives], generator=generators, **{**call, **other}).images

    exchanged = drawn([""] * 2, PROMPTS[:2], guidance_scale=0.8)
    assert [record.negative_image.tobytes() for record in records] == [image.tobytes() for image in exchanged]
    captions = [words(image) for image in exchanged]
    assert [record.negative_prompt for record in records] == captions
    final = drawn(PROMPTS[:2], captions)
    assert [record.images[0].tobytes() for record in records] == [image.tobytes() for image in final]


def test_a_negative_image_needs_guidance():
    pipe = z_image()
    settings = DiffusionNegativePrompt(captioner=words)
    with watched(denoiser(pipe)) as calls, pytest.raises(ValueError, match=r"at guidance_scale 0 .* Give guidance_scale above 0"):
        negengine.diffusion_negative_prompting(pipe, "a cat", settings, seed=1, guidance_scale=0.0, **SIZE)
    assert not calls
