"""Methods with a prompt of their own on the transformers beyond FLUX, beside branches written out as calls of their own."""

import functools
import itertools

import pytest
import torch
from guards import guarded
from literal_branches import Guided, Pushed, text_inputs
from tiny import NEGATIVES, denoiser, watched
from tiny_more import BUILDERS, CALL, FAMILIES, SIZE, against, draw, every, words

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

CALLS = {
    "qwen": "true_cfg_scale",
    "chroma": "guidance_scale",
    "flux2": "guidance_scale",
    "lumina": "guidance_scale",
}  # guided in a second call, by the argument of this name
HALVES = [family for family in FAMILIES if family not in CALLS]
LONG, SHORT = "a very long text", "sea"  # of other lengths than the prompts, where lengths differ
LIVELY = {"scale": 2.0, "prior": 0.3, "tau": 0.05, "delta": 1e-3, "p_max": 0.8, "surrogate": "ancestral"}


def calm(family):
    """In float64, with queries and keys that let differences of the last bit stay small."""
    pipe = BUILDERS[family]()
    for name, parameter in denoiser(pipe).named_parameters():
        if "norm_" in name and name.endswith("weight") and "attn" in name:
            parameter.data.mul_(1 / 3)
    return pipe.to(torch.float64)


def pushed(family, method, dynamic=False, n=2, **call):
    """Latents of ours and of the twin, and ours without."""
    pipe, twin = calm(family), calm(family)
    plain = draw(pipe, n=n, **call)
    texts = [method.prompt] * 2 if isinstance(method.prompt, str) else list(method.prompt)
    literal = Pushed(twin, text_inputs(twin, texts, n), method, scale=CALL[family].get("guidance_scale", 1.0), dynamic=dynamic)
    got = draw(negengine.apply(pipe, method), n=n, **call)
    assert (got - plain).abs().max() > 1e-3
    torch.testing.assert_close(got, draw(twin, n=n, **call), rtol=1e-7, atol=1e-7)
    return negengine.status(pipe)[type(method)], literal


@pytest.mark.parametrize("family, text", guarded(itertools.product(FAMILIES, (SHORT, LONG)), lambda family, text: text == LONG))
def test_negative_prompting(family, text):
    pushed(family, NegativePrompting(prompt=text, scale=2.0))


@every("sd3", "lumina")
def test_dynamic_negative_guidance(family):
    report, literal = pushed(family, DynamicNegativeGuidance(prompt=LONG, **LIVELY), dynamic=True)
    history = torch.stack(literal.history)
    torch.testing.assert_close(torch.tensor(report.p, dtype=torch.float64), history, rtol=1e-6, atol=1e-9)
    assert (history[1] - history[0]).abs().max() > 1e-6


@every("qwen")
def test_a_prompt_for_each_prompt(family):
    pipe = calm(family)
    texts = ((SHORT, LONG), SHORT, LONG)
    each, one, other = (draw(negengine.apply(pipe, NegativePrompting(prompt=text, scale=2.0))) for text in texts)
    torch.testing.assert_close(each[:2], one[:2], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(each[2:], other[2:], rtol=1e-7, atol=1e-7)
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("family", guarded(((family,) for family in CALLS), lambda family: family == "qwen"))
def test_guidance_of_its_own_in_the_same_call(family):
    """Negative prompting with cfg=... is the pipeline's own second call: base and unconditional branch in one batch."""
    pipe, twin = calm(family), calm(family)
    negengine.apply(pipe, NegativePrompting(prompt=LONG, cfg=2.0, cfg_prompt=SHORT, scale=1.5))
    with watched(denoiser(pipe)) as calls:
        got = draw(pipe)
    assert [rows for _, rows in calls] == [12] * 3
    away, none = (text_inputs(twin, [text] * 2, 2) for text in (LONG, SHORT))
    original = twin.transformer.forward

    def forward(**inputs):
        c, n, u = (original(**{**inputs, **text})[0] for text in ({}, away, none))
        base = u + 2.0 * (c - u)
        return (base - 1.5 * (n - base),)

    twin.transformer.forward = forward
    torch.testing.assert_close(got, draw(twin), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("family, text", guarded(itertools.product(FAMILIES, (SHORT, LONG)), lambda family, text: text == LONG))
def test_normalized_attention_guidance(family, text):
    settings = {"scale": 4.0, "tau": 1.5, "alpha": 0.6}
    pipe, twin = calm(family), calm(family)
    plain = draw(pipe)
    literal = Guided(twin, text_inputs(twin, [text] * 2, 2), **settings)
    got = draw(negengine.apply(pipe, NormalizedAttentionGuidance(negative_prompt=text, **settings)))
    expected = draw(twin)
    assert 0 < literal.clamped < literal.tokens
    assert (got - plain).abs().max() > 1e-2
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@every()
def test_nag_beside_negtome(family):
    """Both act; the unguided rows are merged first, and their push reaches the second rows."""
    pipe = BUILDERS[family]()
    merging = NegToMe(threshold=-1, timesteps=(0, 1000))
    alone = draw(negengine.apply(pipe, merging))
    both = draw(negengine.apply(pipe, NormalizedAttentionGuidance(negative_prompt=LONG, scale=4.0, tau=1.5, alpha=0.6)))
    assert not torch.allclose(both, alone, atol=1e-2)
    status = negengine.status(pipe)
    assert status[NegToMe].merged_tokens == status[NegToMe].eligible_tokens > 0
    assert status[NormalizedAttentionGuidance].active_steps == 3
    assert torch.equal(draw(negengine.remove(pipe, NormalizedAttentionGuidance)), alone)


# --- the embedding -----------------------------------------------------------------------------------------------


def texts_seen(pipe):
    seen = []

    def note(module, args, kwargs):
        seen.append(kwargs["encoder_hidden_states"].clone())

    hook = denoiser(pipe).register_forward_pre_hook(note, with_kwargs=True)
    draw(pipe)
    hook.remove()
    return seen


@pytest.mark.parametrize(
    "method",
    [CADS(scale=0.5), pytest.param(SeedVariance(timesteps=(0, 1000)), marks=pytest.mark.exhaustive)],
    ids=["cads", "seed variance"],
)
@every("sd3")
def test_the_conditional_text_is_changed(family, method):
    pipe = BUILDERS[family]()
    clean, noised = texts_seen(pipe), texts_seen(negengine.apply(pipe, method))
    kept = 4 if family in HALVES else 0
    for before, after in zip(clean[:1], noised[:1], strict=True):
        assert torch.equal(before[:kept], after[:kept])
        assert (before[kept:] != after[kept:]).any(-1).any(-1).all()
        assert not torch.equal((after - before)[kept], (after - before)[kept + 1])  # images of one prompt differ
    again = texts_seen(pipe)
    assert all(torch.equal(a, b) for a, b in zip(noised, again, strict=True))


# --- methods of guidance in one batch ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", HALVES)
def test_guidance_interval(family):
    pipe, twin = calm(family), calm(family)
    original = twin.transformer.forward

    def forward(**inputs):
        given = original(**inputs)[0]
        t = float(inputs["timestep"][0]) / 1000
        inside = 0.5 <= (t / (1 - t) if t < 1 else float("inf")) <= 5
        return (given if inside else given[4:].repeat(2, 1, 1, 1),)

    twin.transformer.forward = forward
    got = draw(negengine.apply(pipe, GuidanceInterval(low=0.5, high=5.0)), num_inference_steps=5)
    assert 0 < negengine.status(pipe)[GuidanceInterval].active_steps < 5
    torch.testing.assert_close(got, draw(twin, num_inference_steps=5), rtol=1e-8, atol=1e-8)


@every()
def test_safe_latent_diffusion(family):
    pipe = BUILDERS[family]()
    plain = draw(pipe)
    method = SafeLatentDiffusion(prompt=LONG, warmup=0, scale=30.0, threshold=0.5)
    if family in CALLS:
        with pytest.raises(ValueError, match="use variant='dng'"):
            negengine.apply(pipe, method)
        method = SafeLatentDiffusion.preset("dng", prompt=LONG)
    assert not torch.allclose(draw(negengine.apply(pipe, method)), plain, atol=1e-3)


# --- diffusion-negative prompting --------------------------------------------------------------------------------


@every("sd3")
def test_diffusion_negative_prompting(family):
    """The negative image has the roles of the branches exchanged, and the final run avoids its caption."""
    pipe, twin = BUILDERS[family](), BUILDERS[family]()
    scale = CALLS.get(family, "guidance_scale")
    call = {**SIZE[family], **CALL[family], "num_inference_steps": 2, scale: 3.0}
    texts, seeds = ["a cat", "two dogs"], [5, 11]
    settings = DiffusionNegativePrompt(captioner=words, guidance=4.0)
    records = negengine.diffusion_negative_prompting(pipe, texts, settings, seed=seeds, **call)
    generators = functools.partial(map, lambda seed: torch.Generator().manual_seed(seed), seeds)
    roles = {"prompt": [""] * 2, **against(twin, texts)}
    if family == "lumina":  # where a text in the other role is encoded otherwise
        options = {name: CALL[family][name] for name in ("max_sequence_length", "system_prompt")}
        values = twin.encode_prompt(texts, True, [""] * 2, **options)
        names = ("prompt_embeds", "prompt_attention_mask")
        roles = dict(zip([*(f"negative_{name}" for name in names), *names], values, strict=True))
    exchanged = twin(**roles, generator=list(generators()), **{**call, scale: 4.0}).images
    assert [r.negative_image.tobytes() for r in records] == [image.tobytes() for image in exchanged]
    captions = [words(image) for image in exchanged]
    assert [record.negative_prompt for record in records] == captions
    final = twin(prompt=texts, generator=list(generators()), **against(twin, captions), **call).images
    assert [record.images[0].tobytes() for record in records] == [image.tobytes() for image in final]


# --- what cannot work --------------------------------------------------------------------------------------------


REFUSED = [
    (NegToMe(blocks=("middle",)), {}, "no attention block of this .* is named 'middle'; there are"),
    (NegativePrompting(prompt=("a", "b", "c")), {}, "3 prompts to avoid, but this call has 2"),
    (DynamicNegativeGuidance(prompt="a"), {}, "no transition density.*surrogate='ancestral'"),
    (NegToMe(group_size=3), {}, "group_size 3 does not divide this call's 4 images"),
]


@pytest.mark.parametrize("method, call, message", REFUSED, ids=["blocks", "prompts", "sampler", "groups"])
@every("qwen")
def test_bad_input_before_any_work(family, method, call, message):
    pipe = BUILDERS[family]()
    with watched(denoiser(pipe)) as calls, pytest.raises(ValueError, match=message):
        draw(negengine.apply(pipe, method), **call)
    assert not calls


@pytest.mark.parametrize("family", CALLS)
@pytest.mark.parametrize(
    "method, message",
    [
        (
            NegativePrompting(prompt="a"),
            r"calls the denoiser again.*_scale=1, and NegativePrompting\(cfg=...\) in its place",
        ),
        (NormalizedAttentionGuidance(negative_prompt="a"), "second call of the denoiser.*=1 and no negative_prompt"),
        (CADS(), "calls the denoiser twice"),
    ],
    ids=["negative prompting", "nag", "cads"],
)
def test_guidance_in_a_second_call_is_refused(family, method, message):
    pipe = negengine.apply(BUILDERS[family](), method)
    with watched(denoiser(pipe)) as calls, pytest.raises(ValueError, match=message):
        draw(pipe, **{**against(pipe, NEGATIVES[:2]), CALLS[family]: 2.0})
    assert not calls


def test_cads_in_both_calls():
    """Texts of one length (Chroma) can be changed alike in both; of several (Qwen-Image) they cannot."""
    pipe, method = BUILDERS["chroma"](), CADS(unconditional=True)
    guided = functools.partial(draw, negative_prompt=NEGATIVES[:2])
    plain = guided(pipe, guidance_scale=2.0)
    assert not torch.allclose(guided(negengine.apply(pipe, method), guidance_scale=2.0), plain, atol=1e-2)
    with pytest.raises(ValueError, match=r"calls the denoiser twice.*pass true_cfg_scale=1 ") as refusal:
        guided(negengine.apply(BUILDERS["qwen"](), method), true_cfg_scale=2.0)
    assert "unconditional" not in str(refusal.value)


@pytest.mark.parametrize("family", CALLS)
def test_the_guidance_interval_needs_one_batch(family):
    with pytest.raises(ValueError, match="needs classifier-free guidance in one batch"):
        negengine.apply(BUILDERS[family](), GuidanceInterval(low=0.5, high=5.0))


def test_skipped_layers_are_another_guidance():
    pipe = negengine.apply(BUILDERS["sd3"](), NegativePrompting(prompt="a"))
    with pytest.raises(ValueError, match=r"once more in a step, with skip_layers.*switch that guidance off"):
        draw(pipe, skip_guidance_layers=[1], skip_layer_guidance_stop=1.0)
    negengine.apply(negengine.remove(pipe), NegToMe(threshold=-1, timesteps=(0, 1000)))
    draw(pipe, skip_guidance_layers=[1], skip_layer_guidance_stop=1.0)
    assert negengine.status(pipe)[NegToMe].merged_tokens > 0


def test_embeddings_without_pooled_text_are_refused():
    pipe = calm("sd3")
    text = text_inputs(pipe, ["a"], 1)
    given = negengine.Embeddings(text["encoder_hidden_states"])
    with pytest.raises(ValueError, match=r"Embeddings\(prompt, pooled\)"):
        draw(negengine.apply(pipe, NegativePrompting(prompt=given)))
    whole = negengine.Embeddings(text["encoder_hidden_states"], text["pooled_projections"])
    expected = draw(negengine.apply(pipe, NegativePrompting(prompt="a", scale=2.0)))
    torch.testing.assert_close(draw(negengine.apply(pipe, NegativePrompting(prompt=whole, scale=2.0))), expected)


@pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageLayeredPipeline"])
def test_pipelines_that_edit_images_are_refused(name):
    pipe = BUILDERS["qwen"]()
    pipe.__class__ = type(name, (type(pipe),), {})
    with pytest.raises(TypeError, match=f"does not support {name}: it joins the tokens of other images"):
        negengine.apply(pipe, NegToMe())
