"""Bad input: one clear error each, before the denoiser is called."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import BUILDERS, denoiser, draw, flux, picture, sd, sdxl, watched

import negengine
from negengine import NegToMe, ReferenceImage, apply


def test_unknown_blocks(family):
    there = {"flux": "single_transformer_blocks.0, single_transformer_blocks.1, transformer_blocks.0", "sdxl": "down_blocks.1"}
    with pytest.raises(ValueError, match=rf"is named 'middle'; there are {there[family]}"):
        apply(BUILDERS[family](), NegToMe(blocks=("up_blocks" if family == "sdxl" else "transformer_blocks", "middle")))


BAD = [
    ({"timesteps": (600, 400)}, ValueError, r"600 … 400 is empty; give \(low, high\) with low <= high"),
    ({"timesteps": (1001, 2000)}, ValueError, "outside 0 … 1000"),
    ({"timesteps": (-5, -1)}, ValueError, "outside 0 … 1000"),
    ({"timesteps": 900}, TypeError, r"must be \(low, high\)"),
    ({"timesteps": (float("nan"), 1000)}, ValueError, "finite"),
    ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
    ({"alpha": (0.5, float("inf"))}, ValueError, "alpha must be finite"),
    ({"alpha": ()}, ValueError, "one number per image"),
    ({"alpha": "0.9"}, TypeError, "alpha must be a number"),
    ({"threshold": 1.2}, ValueError, r"must lie in \[-1, 1\], got 1.2"),
    ({"blocks": ()}, ValueError, "leave it out for the family's default"),
    ({"blocks": "up_blocks"}, TypeError, "a sequence of names"),
    ({"min_grid": 0}, ValueError, "positive integer"),
    ({"group_size": 0}, ValueError, "positive integer"),
    ({"reference": "second"}, ValueError, "must be one of .*first.*others.*previous.* or a ReferenceImage"),
    ({"reference": []}, ValueError, "empty"),
    ({"reference": np.zeros((4, 4, 3))}, TypeError, "a ReferenceImage"),
    ({"matching": "published"}, ValueError, "must be one of .*paper.*release"),
    ({"matching": "release", "reference": "others"}, ValueError, "use matching='paper' or reference='first'"),
    ({"dropout": 1.0}, ValueError, r"\[0, 1\)"),
    ({"backend": "abacus"}, ValueError, "unknown backend 'abacus'; there are .*torch"),
    ({"search": "guess"}, ValueError, "search must be one of"),
]


@pytest.mark.parametrize("settings,error,message", BAD, ids=lambda value: str(value)[:40] if isinstance(value, dict) else "")
def test_settings_that_cannot_work(settings, error, message):
    with pytest.raises(error, match=message):
        NegToMe(**settings)


MASKS = [
    (Image.new("L", (40, 50), 255), ValueError, r"mask is \(40, 50\), its picture \(50, 40\) .*make them equal"),
    (Image.new("L", (50, 40), 0), ValueError, "black everywhere"),
    (Image.new("L", (50, 40), 127), ValueError, "black everywhere"),
    (np.ones((40, 50)), TypeError, "mask must be a PIL image, got ndarray"),
]


@pytest.mark.parametrize("mask,error,message", MASKS, ids=["other size", "black", "grey", "array"])
def test_masks(mask, error, message):
    with pytest.raises(error, match=message):
        ReferenceImage(picture(), mask=mask)


def test_a_picture_that_is_no_image():
    with pytest.raises(TypeError, match="reference picture must be a PIL image, got str"):
        ReferenceImage("logo.png")


def test_several_steps_in_one_call_are_refused():
    """Its scheduler makes no steps one by one, so that it was reported to make none."""
    parts = {name: part for name, part in sd().components.items() if name != "image_encoder"}
    parts["scheduler"] = diffusers.DDIMParallelScheduler(clip_sample=False)
    pipe = diffusers.StableDiffusionParadigmsPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(TypeError, match="does not support StableDiffusionParadigmsPipeline: it draws several steps in one call"):
        apply(pipe, NegToMe())


def test_unsupported_pipelines_are_told_what_works_and_then_the_families():
    class OtherPipeline:
        unet = torch.nn.Linear(2, 2)

    expected = (
        r"does not know OtherPipeline \(its denoiser is a Linear\)\. negengine\.attach puts NegToMe on any denoiser.*"
        r"register_family \(docs/families\.md\)\. It knows FLUX\.1, SDXL, .*, Z-Image\.$"
    )
    for call in (lambda p: apply(p, NegToMe()), negengine.remove, negengine.status):
        with pytest.raises(TypeError, match=expected):
            call(OtherPipeline())


@pytest.mark.parametrize("target,told", [(None, "None"), ("a/model", "str"), (3, "int")])
def test_what_is_no_pipeline(target, told):
    for call in (lambda p: apply(p, NegToMe()), negengine.remove, negengine.status):
        with pytest.raises(TypeError, match=rf"takes a pipeline of diffusers, or its denoiser .*, got {told}$"):
            call(target)


def test_a_unet_of_another_family():
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    with pytest.raises(TypeError, match=r"does not know UNet2DConditionModel.*add a family.*SDXL"):
        apply(unet, NegToMe())


def test_settings_of_no_known_method():
    with pytest.raises(TypeError, match=r"settings must be of .*negengine\.NegToMe.*, got dict"):
        apply(flux(), {"alpha": 0.9})
    with pytest.raises(TypeError, match="got the class NegToMe; call it"):
        apply(flux(), NegToMe)


def test_bare_denoisers(family):
    model = denoiser(BUILDERS[family]())
    with pytest.raises(ValueError, match=r"set NegToMe\(group_size=...\)"):
        apply(model, NegToMe(timesteps=(0, 1000)))
    with pytest.raises(ValueError, match=r"scheduler=...\), or NegToMe\(timesteps=\(0, 1000\)\)"):
        apply(model, NegToMe(group_size=2))
    with pytest.raises(ValueError, match="with a constant alpha"):
        apply(model, NegToMe(group_size=2, timesteps=(0, 1000), alpha=lambda t: t / 1000))
    with pytest.raises(ValueError, match="apply to the pipeline"):
        apply(model, NegToMe(group_size=2, timesteps=(0, 1000), reference=ReferenceImage(picture())))


def test_a_scheduler_beside_a_pipeline():
    pipe = sdxl()
    with pytest.raises(ValueError, match="`scheduler` is for a bare denoiser"):
        apply(pipe, NegToMe(), scheduler=pipe.scheduler)


def test_pictures_without_a_vae():
    pipe = flux()
    pipe.vae = None
    with pytest.raises(ValueError, match="this pipeline has none"):
        apply(pipe, NegToMe(reference=ReferenceImage(picture())))


def refused(pipe, error, message, **kwargs):
    with watched(denoiser(pipe)) as calls, pytest.raises(error, match=message):
        draw(pipe, **kwargs)
    assert not calls


def test_group_size_that_does_not_divide_the_batch(family):
    pipe = apply(BUILDERS[family](), NegToMe(group_size=4))
    refused(pipe, ValueError, "group_size 4 does not divide this call's 6 images; choose a divisor, or leave it out", n=3)


def test_group_size_that_does_not_divide_the_batch_of_a_bare_denoiser():
    """Here the first call tells; its blocks do not run."""
    pipe = sdxl()
    apply(pipe.unet, NegToMe(group_size=3, timesteps=(0, 1000), min_grid=1))
    with pytest.raises(ValueError, match="group_size 3 does not divide the denoiser's batch of 8"):
        draw(pipe)


def test_alpha_of_another_number_of_images(family):
    pipe = apply(BUILDERS[family](), NegToMe(alpha=(0.5, 0.9)))
    refused(pipe, ValueError, "alpha has 2 values, one per image, but a group has 3 images", n=3)


def test_an_alpha_function_that_gives_no_number(family):
    pipe = apply(BUILDERS[family](), NegToMe(alpha=lambda t: float("nan")))
    refused(pipe, ValueError, "must be finite, got nan")
    pipe = apply(BUILDERS[family](), NegToMe(alpha=lambda t: 0.5 if t > 500 else float("inf")))
    refused(pipe, ValueError, "must be finite, got inf")


def test_a_picture_with_an_inpainting_denoiser():
    parts = sdxl(in_channels=9).components
    pipe = diffusers.StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    apply(pipe, NegToMe(reference=ReferenceImage(picture())))
    canvas = {"image": picture(3, (56, 72)), "mask_image": Image.new("L", (56, 72), 255)}
    refused(
        pipe,
        ValueError,
        "this denoiser takes 9 channels, but a reference picture has 4: inpainting .* not supported",
        strength=1.0,
        **canvas,
    )


def test_after_an_error_a_good_call_works(family):
    pipe, fresh = BUILDERS[family](), BUILDERS[family]()
    settings = NegToMe(group_size=2, threshold=-1, timesteps=(0, 1000), min_grid=1)
    apply(pipe, settings), apply(fresh, settings)
    refused(pipe, ValueError, "group_size 2 does not divide", prompts=1, n=3)
    assert torch.equal(draw(pipe), draw(fresh))


def test_kontext_is_refused():
    pipe = flux()
    components = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    with pytest.raises(TypeError, match="does not support FluxKontextPipeline: it joins the tokens of another image"):
        negengine.apply(diffusers.FluxKontextPipeline(**components), negengine.NegToMe())


@pytest.mark.parametrize("builder", [flux, sdxl])
def test_a_search_that_no_backend_has(builder):
    pipe = negengine.apply(builder(), negengine.NegToMe(search="fp8"))
    with watched(denoiser(pipe)) as calls, pytest.raises(RuntimeError, match="search='fp8'"):
        draw(pipe)
    assert not calls


def test_a_mask_that_no_token_sees():
    mask = Image.new("L", (640, 480), 0)
    mask.putpixel((3, 3), 255)
    pipe = negengine.apply(flux(), negengine.NegToMe(reference=negengine.ReferenceImage(Image.new("RGB", (640, 480)), mask)))
    with watched(denoiser(pipe)) as calls, pytest.raises(ValueError, match="white parts of mask 0 fall between"):
        draw(pipe)
    assert not calls


class BlocksElsewhere(diffusers.FluxTransformer2DModel):
    """As nunchaku's: a subclass of a known denoiser, whose blocks are in one module that is not PyTorch's."""

    def __init__(self, **config):
        super().__init__(**config)
        self.transformer_blocks = self.single_transformer_blocks = torch.nn.ModuleList([torch.nn.Identity()])


def test_a_denoiser_whose_blocks_are_elsewhere():
    pipe = BUILDERS["flux"]()
    config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    pipe.transformer = BlocksElsewhere(**config)
    with pytest.raises(TypeError, match=r"no module 'transformer_blocks\.0\.attn\.to_out\.0', .* computed elsewhere"):
        negengine.apply(pipe, negengine.NegToMe())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())
    negengine.apply(pipe, negengine.SeedVariance())
    with pytest.raises(ValueError, match="no method is applied"):
        negengine.status(negengine.remove(pipe))


def test_blocks_that_went_elsewhere_after_apply():
    pipe = negengine.apply(BUILDERS["flux"](), negengine.NegToMe())
    pipe.transformer.single_transformer_blocks = torch.nn.ModuleList([])
    with pytest.raises(TypeError, match=r"no module 'single_transformer_blocks\.0\.attn'"):
        draw(pipe)
