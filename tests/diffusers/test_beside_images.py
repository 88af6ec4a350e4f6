"""Pipelines that begin with an image or are steered by one: merged as within their attention, or refused with the reason."""

import functools

import diffusers
import pytest
import torch
from compare import assert_same, hooked, literal
from tiny import SIZE, _parts, _quiet, denoiser, draw, flux, half_mask, picture, sdxl, watched
from tiny_beside import FLUX_PARTS, adapter, canvas, flux_control, flux_fill, inpaint, instruct, refiner, size
from tiny_more import BUILDERS

import negengine
from negengine import NegToMe, NormalizedAttentionGuidance, ReferenceImage

REST = pytest.mark.exhaustive
MERGE = {"timesteps": (0, 1000), "threshold": -1, "min_grid": 1}
SQUARE = {"height": 64, "width": 64}
HINT = picture(9, (64, 64))

# name -> how the pipeline is built, and what it is called with
STEERED = {
    "flux inpaint": (functools.partial(inpaint, "flux"), canvas("flux")),
    "sdxl inpaint": (functools.partial(inpaint, "sdxl"), canvas("sdxl")),
    "sdxl inpaint, 9 channels": (functools.partial(inpaint, "sdxl", in_channels=9), canvas("sdxl")),
    "sd inpaint, 9 channels": (functools.partial(inpaint, "sd", in_channels=9), canvas("sd")),
    "flux fill": (flux_fill, {"image": picture(9, size("flux")), "mask_image": half_mask(size("flux"))}),
    "flux control": (flux_control, {"control_image": picture(9, size("flux"))}),
    "sdxl adapter": (functools.partial(adapter, "sdxl"), {"image": HINT, "prompts": 1, **SQUARE}),
    "sd adapter": (functools.partial(adapter, "sd"), {"image": HINT, "prompts": 1, **SQUARE}),
    "refiner": (refiner, {}),
}
GUARDS = ("flux inpaint", "sdxl inpaint, 9 channels", "flux fill", "flux control", "sdxl adapter")


def cases(names, guards=GUARDS):
    return [pytest.param(name, marks=() if name in guards else REST) for name in names]


def build(name):
    make, arguments = STEERED[name]
    return make(), functools.partial(draw, **arguments)


@pytest.mark.parametrize("name", cases(STEERED))
def test_as_merged_within_the_attention(name, monkeypatch):
    make, arguments = STEERED[name]
    monkeypatch.setitem(BUILDERS, name, make)
    status = assert_same(name, functools.partial(draw, num_inference_steps=2, **arguments), 2)
    assert 0 < status.active_steps == status.steps


EXTRA = ("sdxl inpaint, 9 channels", "flux fill", "flux control")


@pytest.mark.parametrize("name", cases(EXTRA, ("sdxl inpaint, 9 channels", "flux control")))
def test_a_picture_cannot_join_extra_channels(name):
    """Refused before the first step, also where the window begins later; afterwards the pipeline works."""
    pipe, call = build(name)
    negengine.apply(pipe, NegToMe(**MERGE | {"timesteps": (0, 400)}, reference=ReferenceImage(picture())))
    with watched(denoiser(pipe)) as calls, pytest.raises(ValueError, match=r"this denoiser takes \d+ channels, but a reference"):
        call(pipe)
    assert not calls
    negengine.apply(pipe, NegToMe(**MERGE))
    call(pipe, num_inference_steps=2)
    assert negengine.status(pipe)[NegToMe].merged_tokens


@pytest.mark.parametrize("name", cases(("flux inpaint", "sdxl adapter", "refiner"), ("sdxl adapter",)))
def test_a_picture_beside_it(name):
    """Joined rows get a row of all that steers; what they are does not reach the others where nothing is pushed."""
    pipe, call = build(name)
    plain = call(pipe)
    negengine.apply(pipe, NegToMe(**MERGE, alpha=0.0, reference=ReferenceImage(picture())))
    torch.testing.assert_close(call(pipe), plain, rtol=1e-4, atol=1e-4)
    negengine.apply(pipe, NegToMe(**MERGE, reference=ReferenceImage(picture())))
    assert not torch.allclose(call(pipe), plain, atol=1e-2)


@pytest.mark.parametrize("name", cases((*EXTRA, "sdxl adapter"), ("flux control",)))
def test_nag_and_negative_prompting_beside_it(name):
    """Their rows repeat what steers: the same prompt as the call's own changes nothing, another one does."""
    pipe, call = build(name)
    unguided = {} if "flux" in name else {"guidance_scale": 1.0}
    call = functools.partial(call, prompts=1, num_inference_steps=2, **unguided)
    plain = call(pipe)
    for method in (NormalizedAttentionGuidance, functools.partial(negengine.NegativePrompting, scale=2.0)):
        name = "prompt" if isinstance(method, functools.partial) else "negative_prompt"
        negengine.apply(negengine.remove(pipe), method(**{name: "a cat"}))
        torch.testing.assert_close(call(pipe), plain, rtol=1e-3, atol=1e-3)
        negengine.apply(negengine.remove(pipe), method(**{name: "the sea"}))
        assert not torch.allclose(call(pipe), plain, rtol=1e-3, atol=1e-3)


# --- the refiner -------------------------------------------------------------------------------------------------


def test_split_denoising():
    """Each has its own methods, in its own part of the timesteps; the window is that of the whole run."""
    twins = sdxl(), refiner()
    start = functools.partial(draw, prompts=1, num_inference_steps=4, denoising_end=0.5)
    half, first_seed = literal(twins[0], start, 2)
    other = functools.partial(draw, prompts=1, num_inference_steps=4, denoising_start=0.5, image=half)
    expected, seed = literal(twins[1], other, 2)
    base, last = sdxl(), refiner()
    got, first = hooked(base, lambda pipe: start(pipe, seed=first_seed), timesteps=(0, 1000))
    assert torch.equal(got, half)
    got, second = hooked(last, lambda pipe: other(pipe, seed=seed), timesteps=(0, 1000))
    assert torch.equal(got, expected)
    assert (first.steps, first.active_steps, second.steps, second.active_steps) == (2, 2, 2, 2)
    negengine.apply(last, NegToMe(**MERGE | {"timesteps": (500, 1000)}))
    other(last)
    assert negengine.status(last)[NegToMe].active_steps == 0


# --- FLUX Redux --------------------------------------------------------------------------------------------------


def redux(pipe, seed=2):
    """A call with what a Redux prior makes of a picture: one row, longer than any text, for all images."""
    generator = torch.Generator().manual_seed(6)
    embeds, pooled = torch.randn(1, 600, 32, generator=generator), torch.randn(1, 32, generator=generator)
    latents = torch.randn(2, 35, 16, generator=torch.Generator().manual_seed(seed))
    call = {"num_inference_steps": 2, "output_type": "latent", "latents": latents, **SIZE["flux"]}
    return pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, num_images_per_prompt=2, **call).images


def test_flux_redux():
    assert_same("flux", redux, 2)


def test_nag_beside_flux_redux():
    """The negative text is filled up to the length of the picture's."""
    pipe = flux()
    plain = redux(pipe)
    negengine.apply(pipe, NormalizedAttentionGuidance(negative_prompt="the sea"))
    assert not torch.allclose(redux(pipe), plain, rtol=1e-2, atol=1e-2)
    assert negengine.status(pipe)[NormalizedAttentionGuidance].active_steps == 2


def test_the_redux_prior_itself_is_refused():
    prior = object.__new__(diffusers.FluxPriorReduxPipeline)
    with pytest.raises(TypeError, match="does not know FluxPriorReduxPipeline"):
        negengine.apply(prior, NegToMe())


# --- pipelines whose batches are otherwise -----------------------------------------------------------------------


def edited(pipe, **kwargs):
    return draw(pipe, prompts=1, image=HINT, image_guidance_scale=1.5, num_inference_steps=2, **SQUARE, **kwargs)


def test_instruct_pix2pix():
    """Three rows for each image: groups are merged, the first of each group is left alone."""
    plain = edited(instruct())
    pipe = negengine.apply(instruct(), NegToMe(**MERGE))
    merged = edited(pipe)
    torch.testing.assert_close(merged[0], plain[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged[1], plain[1], atol=1e-2)


TELLERS = {
    "CADS": negengine.CADS(),
    "seed variance": negengine.SeedVariance(),
    "guidance interval": negengine.GuidanceInterval(low=0.2, high=3.0),
    "NAG": NormalizedAttentionGuidance(negative_prompt="dull"),
    "negative prompting": negengine.NegativePrompting(prompt="dull"),
}


@pytest.mark.parametrize("name", TELLERS)
def test_methods_that_must_tell_branches_refuse_instruct_pix2pix(name):
    """Its conditional rows come first, those of others last."""
    pipe = instruct()
    with pytest.raises(ValueError, match=f"{name} must know which rows .* conditional .* cannot on StableDiffusionXLInst"):
        negengine.apply(pipe, NegToMe(), TELLERS[name])
    with pytest.raises(ValueError, match="no method is applied"):
        negengine.status(pipe)


@pytest.mark.parametrize("family, rows", [("sdxl", 6), ("sdxl", 3), ("flux", 4)])
def test_a_batch_of_other_rows_is_refused(family, rows):
    """Of a pipeline that no family knows; before any of its rows is changed."""
    pipe = negengine.apply(BUILDERS[family](), TELLERS["CADS"])
    own = denoiser(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: cut(args, kwargs, rows), with_kwargs=True, prepend=True
    )
    with pytest.raises(ValueError, match=f"called with {rows} rows for 2 images; CADS knows one row per image, or two"):
        draw(pipe, prompts=1)
    own.remove()
    draw(pipe, prompts=1)


def cut(args, kwargs, rows):
    """All inputs with so many rows."""

    def many(value):
        if isinstance(value, dict):
            return {name: many(part) for name, part in value.items()}
        if isinstance(value, torch.Tensor) and value.ndim and len(value) in (2, 4):
            return torch.cat([value] * 3)[:rows]
        return value

    return tuple(map(many, args)), many(kwargs)


def test_pipelines_without_the_calls_that_are_heard_are_refused():
    """Else nothing would act, and nobody would be told why."""
    parts = _parts(BUILDERS["sd"](), without=())
    pipe = _quiet(diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False))
    with pytest.raises(TypeError, match=r"Pix2PixPipeline has no encode_prompt, .*apply\(pipe.unet, NegToMe\(group"):
        negengine.apply(pipe, NegToMe())


UNSUPPORTED = {
    "LEditsPPPipelineStableDiffusionXL": "rows for every edit",
    "StableDiffusionPanoramaPipeline": "parts of the image",
    "StableDiffusionAttendAndExcitePipeline": "gradients through the denoiser",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_pipelines_that_cannot_be_served_say_why(name):
    pipe = object.__new__(getattr(diffusers, name))
    vars(pipe)["unet"] = BUILDERS["sdxl" if "XL" in name else "sd"]().unet
    with pytest.raises(TypeError, match=f"does not support {name}: .*{UNSUPPORTED[name]}"):
        negengine.apply(pipe, NegToMe())


def test_denoisers_of_other_classes_are_refused():
    """ControlNet-XS and AnimateDiff bring UNets of their own."""
    pipe = object.__new__(diffusers.StableDiffusionXLControlNetXSPipeline)
    vars(pipe)["unet"] = object.__new__(diffusers.UNetControlNetXSModel)
    torch.nn.Module.__init__(pipe.unet)
    with pytest.raises(TypeError, match=r"XLControlNetXSPipeline \(its denoiser is a UNetControlNetXS"):
        negengine.apply(pipe, NegToMe())


@pytest.mark.parametrize("strength", [0.4, pytest.param(1.0, marks=REST)])
def test_control_nets_of_image_to_image(strength):
    """Both at once, in FLUX: the first timesteps are left out, and the control net's residuals are joined."""
    parts = _parts(BUILDERS["flux_controlnet"](), without=FLUX_PARTS)
    pipe = _quiet(diffusers.FluxControlNetImg2ImgPipeline(**parts))
    hint = picture(8, size("flux"))
    call = functools.partial(draw, image=hint, strength=strength, num_inference_steps=4, prompts=1)
    plain = call(pipe)
    negengine.apply(pipe, NegToMe(**MERGE, alpha=0.0, reference=ReferenceImage(picture())))
    torch.testing.assert_close(call(pipe), plain, rtol=1e-4, atol=1e-4)
    negengine.apply(pipe, NegToMe(**MERGE))
    merged = call(pipe)
    torch.testing.assert_close(merged[0], plain[0], rtol=1e-4, atol=1e-4)
    assert (merged[1] - plain[1]).abs().max() > 1e-3
