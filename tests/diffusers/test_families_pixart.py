"""PixArt-Sigma, described from outside the package as docs/families.md says: cross-attention, masks, a learned variance."""

import dataclasses
import functools

import diffusers
import pytest
import tiny
import torch
from tiny import half_mask, picture

import negengine
from negengine import (
    CADS,
    DynamicNegativeGuidance,
    GuidanceInterval,
    NegativePrompting,
    NegToMe,
    NormalizedAttentionGuidance,
    ReferenceImage,
    reference,
)
from negengine.diffusers import Conditioning, Family, Latents, Site, Tokens, families

GRID = (5, 7)
PIXART = Family(
    name="PixArt-Sigma",
    component="transformer",
    pipelines=("PixArtSigmaPipeline",),
    matches=lambda module: isinstance(module, diffusers.PixArtTransformer2DModel),
    tokens=Tokens(
        sites=lambda model: (
            Site(name, name, "output")
            for i in range(len(model.transformer_blocks))
            for name in (f"transformer_blocks.{i}.attn1", f"transformer_blocks.{i}.attn2")
        ),
        grids=lambda height, width: {height // 2 * (width // 2): (height // 2, width // 2)},
    ),
    latents=Latents(size=lambda inputs: tuple(inputs["hidden_states"].shape[-2:])),
    conditioning=Conditioning(
        sample="hidden_states",
        batched=("encoder_hidden_states", "encoder_attention_mask", "timestep"),
        prompts=lambda encoded: {"encoder_hidden_states": encoded[0], "encoder_attention_mask": encoded[1]},
        longest=None,
        mask="encoder_attention_mask",
        cfg="halves",
        embeds=("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
    ),
    defaults={
        "negtome": {"alpha": 0.9, "threshold": 0.7, "timesteps": (800, 1000), "blocks": ("transformer_blocks",), "min_grid": 1},
        "nag": {"scale": 5.0, "tau": 2.5, "alpha": 0.25},
    },
)


@pytest.fixture(autouse=True)
def known():
    with families.registered(PIXART):
        yield


def pixart():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t5 = tiny._t5_tokenizer()
        transformer = diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            sample_size=16,
            caption_channels=tiny.WIDTH,
            use_additional_conditions=False,
        )
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
        pipe = diffusers.PixArtSigmaPipeline(
            tokenizer=t5,
            text_encoder=tiny._t5(t5),
            vae=tiny._vae(),
            transformer=transformer,
            scheduler=diffusers.DDIMScheduler(**tiny.BETAS, clip_sample=False),
        )
    return tiny._lively(pipe, text=4).to(torch.float64)


def draw(pipe, prompts=("a cat", "two dogs"), n=2, **call):
    call = {"guidance_scale": 1.0, "num_inference_steps": 3, "max_sequence_length": 20, **call}
    options = {"height": 80, "width": 112, "use_resolution_binning": False, "output_type": "latent"}
    generator = torch.Generator().manual_seed(1)
    return pipe(list(prompts), num_images_per_prompt=n, generator=generator, **options, **call).images


def test_a_block_gives_what_the_mathematics_says():
    """With guidance in one batch, and a masked picture."""
    pipe, seen = pixart(), []
    module = pipe.transformer.get_submodule("transformer_blocks.1.attn1")
    listen = functools.partial(module.register_forward_hook, lambda module, args, output: seen.append(output.clone()))
    listen()
    given = ReferenceImage(picture(), mask=half_mask())
    settings = {"timesteps": (0, 1000), "threshold": 0.3, "alpha": 0.8, "blocks": ("transformer_blocks.1.attn1",)}
    negengine.apply(pipe, NegToMe(**settings, reference=given))
    listen()
    draw(pipe, guidance_scale=3.0, num_inference_steps=1)
    before, after = seen
    assert before.shape[:2] == (8 + 4, GRID[0] * GRID[1])
    pixels = torch.zeros(1, 1, 40, 50)
    pixels[..., :25] = 1
    allowed = torch.nn.functional.interpolate(pixels, GRID, mode="nearest-exact").flatten() > 0.5
    for row in range(8):
        expected = reference.negtome(before[row], before[8 + row // 2], 0.8, 0.3, allowed, "paper")
        torch.testing.assert_close(after[row], expected)
    assert not torch.equal(after[:8], before[:8])
    assert torch.equal(after[8:], before[8:])


def test_negative_prompting():
    """The text to avoid is longer than the prompts, and masked by itself."""
    pipe, twin, away = pixart(), pixart(), "a long text"
    original = twin.transformer.forward
    with torch.no_grad():
        embeds, mask, *_ = twin.encode_prompt([away] * 4, False, max_sequence_length=20)

    def forward(x, **inputs):
        e, against = original(x, **inputs)[0], {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        return (e - 2.0 * (original(x, **inputs | against)[0] - e),)

    twin.transformer.forward = forward
    plain = draw(pipe)
    got = draw(negengine.apply(pipe, NegativePrompting(prompt=away, scale=2.0)))
    assert (got - plain).abs().max() > 1e-2
    torch.testing.assert_close(got, draw(twin))


def test_embeddings_of_another_length():
    """They are filled up and masked."""
    pipe, away = pixart(), "a long text"
    with torch.no_grad():
        embeds, mask, *_ = pipe.encode_prompt(away, False, max_sequence_length=20)
    text = embeds[:, : int(mask.sum())]
    assert text.shape[1] < 20
    got = draw(negengine.apply(pipe, NegativePrompting(prompt=negengine.Embeddings(text), scale=2.0)))
    torch.testing.assert_close(got, draw(negengine.apply(pipe, NegativePrompting(prompt=away, scale=2.0))))


def test_dynamic_negative_guidance_does_not_look_at_the_learned_variance():
    pipe, loud = pixart(), pixart()
    loud.transformer.proj_out.weight.data.view(2, 2, 8, -1)[:, :, 4:] *= 100
    method = DynamicNegativeGuidance(prompt="sea", prior=0.3, tau=0.05, delta=1e-3, p_max=0.8, surrogate="ancestral")
    assert torch.equal(draw(negengine.apply(pipe, method)), draw(negengine.apply(loud, method)))
    p = torch.tensor(negengine.status(pipe)[DynamicNegativeGuidance].p)
    assert (p[1] - p[0]).abs().max() > 1e-6
    assert torch.equal(p, torch.tensor(negengine.status(loud)[DynamicNegativeGuidance].p))


@pytest.mark.parametrize(
    "method", [NegativePrompting(prompt="sea"), DynamicNegativeGuidance(prompt="sea", surrogate="ancestral")], ids=["fixed", "dng"]
)
def test_a_pipeline_that_does_not_tell_its_scale(method):
    """It was taken for 1, so that guidance was lost."""
    pipe = negengine.apply(pixart(), method)
    with pytest.raises(ValueError, match=r"does not tell its scale .*guidance_scale\), .*; pass guidance_scale=1 to its call"):
        draw(pipe, guidance_scale=3.0)


@pytest.mark.parametrize("scale", [1.0, pytest.param(3.0, marks=pytest.mark.exhaustive)])
def test_normalized_attention_guidance(scale):
    """Away from the prompt itself it changes nothing, from another text it does."""
    pipe = pixart()
    plain = draw(pipe, guidance_scale=scale)
    same = draw(negengine.apply(pipe, NormalizedAttentionGuidance(negative_prompt=("a cat", "two dogs"))), guidance_scale=scale)
    torch.testing.assert_close(same, plain, rtol=1e-6, atol=1e-6)
    other = draw(negengine.apply(pipe, NormalizedAttentionGuidance(negative_prompt="a longer text")), guidance_scale=scale)
    assert (other - plain).abs().max() > 1e-2


@pytest.mark.parametrize("method", [CADS(scale=0.5), GuidanceInterval(low=0.5, high=5.0)], ids=["cads", "interval"])
def test_other_methods(method):
    pipe = pixart()
    plain = draw(pipe, guidance_scale=3.0)
    assert (draw(negengine.apply(pipe, method), guidance_scale=3.0) - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "read",
    [
        lambda encoded: {"encoder_hidden": encoded[0]},
        lambda encoded: {"encoder_hidden_states": encoded[0], "mask": encoded[1]},
        lambda encoded: {},
    ],
    ids=["text", "mask", "nothing"],
)
def test_prompts_that_become_no_inputs(read):
    conditioning = dataclasses.replace(PIXART.conditioning, prompts=read)
    families.forget_family(PIXART)
    with families.registered(dataclasses.replace(PIXART, conditioning=conditioning)):
        pipe = negengine.apply(pixart(), NegativePrompting(prompt="sea"))
        with (
            tiny.watched(pipe.transformer) as calls,
            pytest.raises(ValueError, match=r"Conditioning\(prompts=...\) of the family PixArt-Sigma gives .* must give enc"),
        ):
            draw(pipe)
        assert not calls


def test_prompts_that_become_no_inputs_where_none_is_encoded():
    conditioning = dataclasses.replace(PIXART.conditioning, prompts=lambda encoded: {"encoder_hidden": encoded[0]})
    families.forget_family(PIXART)
    with (
        families.registered(dataclasses.replace(PIXART, conditioning=conditioning)),
        pytest.raises(ValueError, match=r"Conditioning\(prompts=...\) .* gives 'encoder_hidden', but it must give the text"),
    ):
        draw(negengine.apply(pixart(), CADS()), guidance_scale=3.0)


def test_a_site_that_is_never_called():
    """diffusers' ``to_out`` is a list."""
    silent = Site("transformer_blocks.0.attn1", "transformer_blocks.0.attn1.to_out", "input")
    tokens = Tokens(sites=lambda model: [silent], grids=PIXART.tokens.grids)
    with families.registered(Family(**{**vars(PIXART), "name": "PixArt, misheard", "tokens": tokens})):
        families.forget_family(PIXART)
        with pytest.raises(TypeError, match=r"is a ModuleList, which is never called.*\(transformer_blocks.0.attn1.to_out.0\)"):
            negengine.apply(pixart(), NegToMe())
