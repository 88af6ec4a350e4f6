"""Scripts that call the release as its README, its notebooks and its web demos do: with another import they draw the same.

Their arguments are as they stand there, sizes and steps included. Only what ``from_pretrained`` gives is tiny, and has a VAE
that scales by 32, so that a CPU can draw pictures of 1024 x 1024.
"""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from literal_release import Release, encoded
from PIL import Image, ImageDraw
from tiny import BUILDERS, picture

import negengine
from negengine.compat.flux import FluxNegToMePipeline
from negengine.compat.flux import NegtomeArgs as FluxArgs
from negengine.compat.sdxl import NegtomeArgs as SDXLArgs
from negengine.compat.sdxl import StableDiffusionXLNegToMePipeline

REST = pytest.mark.exhaustive
CONTRAST = {"flux": 30.0, "sdxl": 2.0}  # a random VAE decodes to nearly one grey


def tiny_pipeline(family):
    """Of diffusers, with the schedule of the published model."""
    pipe, levels = BUILDERS[family](), 6
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.vae = diffusers.AutoencoderKL(
            block_out_channels=(4,) * levels,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            norm_num_groups=1,
            **({"shift_factor": 0.06, "scaling_factor": 1.5} if family == "flux" else {}),
        ).eval()
    pipe.vae.decoder.conv_out.weight.data.mul_(CONTRAST[family])
    if family == "flux":
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        )
    left_out = ("image_encoder", "feature_extractor")
    parts = {name: part for name, part in pipe.components.items() if name not in left_out}
    return type(pipe), parts | ({"add_watermarker": False} if family == "sdxl" else {})


@pytest.fixture
def serve(monkeypatch):
    """``serve(dtype)``: from here on ``from_pretrained`` gives tiny pipelines of that dtype, and "cuda" is the CPU.

    What it returns makes the pipeline of diffusers that the same ``from_pretrained`` would.
    """
    to = diffusers.DiffusionPipeline.to

    def of_name(cls, name, dtype):
        kind, parts = tiny_pipeline("flux" if "FLUX" in name else "sdxl")
        pipe = to((cls or kind)(**parts), dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def serve(dtype):
        given = classmethod(lambda cls, name, torch_dtype: of_name(cls, name, dtype))
        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", given)
        monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda pipe, device: pipe)
        return lambda name: of_name(None, name, dtype)

    return serve


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


def alongside(images, side):
    """A row of pictures, as the notebooks show them."""
    return Image.fromarray(np.concatenate([np.array(image.resize((side, side))) for image in images], axis=1))


# --- the scripts ---------------------------------------------------------------------------------------------------------

FLUX_NAME, SDXL_NAME = "black-forest-labs/FLUX.1-dev", "SG161222/RealVisXL_V4.0"
FLUX_CALL = {
    "prompt": "a high resolution photo of a person",
    "guidance_scale": 3.5,
    "height": 768,
    "width": 768,
    "num_inference_steps": 25,
    "num_images_per_prompt": 4,
}
FLUX_SETTINGS = {
    "use_negtome": False,
    "merging_alpha": 0.9,
    "merging_threshold": 0.65,
    "merging_t_start": 1000,
    "merging_t_end": 900,
    "num_joint_blocks": -1,
    "num_single_blocks": -1,
}
SDXL_CALL = {
    "prompt": "a 3D animation of a cute cat",
    "guidance_scale": 5.0,
    "height": 1024,
    "width": 1024,
    "num_inference_steps": 50,
    "num_images_per_prompt": 4,
    "negative_prompt": "deformed, blurry, watermarks, oversaturated",
}
SDXL_SETTINGS = {
    "use_negtome": True,
    "merging_alpha": 1.5,
    "merging_threshold": 0.7,
    "merging_t_start": 950,
    "merging_t_end": 800,
    "blocks": ["up_blocks"],
}


def with_and_without(pipe, call, settings, seed=0):
    """The README's loop: the same seed, with the argument of the call alone changed."""
    shown = []
    for use_negtome in [False, True]:
        generator = torch.Generator(pipe.device).manual_seed(seed)
        images = pipe(**call, generator=generator, use_negtome=use_negtome, negtome_args=settings).images
        shown.append(images)
        assert alongside(images, 512).size == (512 * len(images), 512)
    return [pixels(images) for images in shown]


def flux_script(settings, **changes):
    pipe = FluxNegToMePipeline.from_pretrained(FLUX_NAME, torch_dtype=torch.bfloat16)
    pipe = pipe.to("cuda:3")
    return pipe, *with_and_without(pipe, FLUX_CALL | changes, settings)


def sdxl_script(settings, **changes):
    pipe = StableDiffusionXLNegToMePipeline.from_pretrained(SDXL_NAME, torch_dtype=torch.float16)
    pipe = pipe.to("cuda")
    with torch.no_grad():
        return pipe, *with_and_without(pipe, SDXL_CALL | changes, settings)


# --- what the release would have drawn ----------------------------------------------------------------------------------


def drawn(twin, call, seed=0):
    return pixels(twin(**call, generator=torch.Generator().manual_seed(seed)).images)


def expected(twin, call, low, high, alpha, threshold, **settings):
    """Pictures of the twin with the test's processors, and its active steps."""
    release = Release(twin, call["num_images_per_prompt"], low, high, alpha, threshold, **settings)
    return drawn(twin, call), sum(release.active)


def check(merged, plain, theirs, theirs_plain, least=10):
    """The same to 1/255; and no small matter: merging changes pictures by ``least`` and more."""
    assert np.array_equal(plain, theirs_plain)
    assert np.abs(merged - theirs).max() <= 1
    assert np.abs(merged - plain).max() >= least


NOTEBOOK = FLUX_SETTINGS | {"merging_dropout": 0.0}


SMALL = {"num_inference_steps": 6, "num_images_per_prompt": 2, "height": 256, "width": 256}


@pytest.mark.parametrize(
    "settings,changes",
    [
        pytest.param(FLUX_SETTINGS, {}, id="README", marks=REST),
        pytest.param(NOTEBOOK, {}, id="notebook", marks=REST),
        pytest.param(NOTEBOOK, SMALL, id="notebook, small"),
        pytest.param(dataclasses.asdict(FluxArgs()), SMALL, id="NegtomeArgs", marks=REST),
    ],
)
def test_flux_diversity(serve, settings, changes):
    call = FLUX_CALL | changes
    twin = serve(torch.float32)(FLUX_NAME)
    pipe, plain, merged = flux_script(settings, **changes)
    theirs_plain = drawn(twin, call)
    theirs, active = expected(twin, call, 900, 1000, 0.9, 0.65)
    check(merged, plain, theirs, theirs_plain, least=2)
    assert negengine.status(pipe).active_steps == active > 0


def test_flux_diversity_in_bfloat16(serve):
    """The steps that merge are the release's, which rounds the timestep; pictures are those of its rule computed in float32.

    In few steps: over those of the README, rounding comes to choose other tokens.
    """
    call = FLUX_CALL | SMALL
    twin = serve(torch.bfloat16)(FLUX_NAME)
    pipe, plain, merged = flux_script(FLUX_SETTINGS, **SMALL)
    theirs_plain = drawn(twin, call)
    theirs, active = expected(twin, call, 900, 1000, 0.9, 0.65, rule_in=torch.float32)
    check(merged, plain, theirs, theirs_plain, least=2)
    assert negengine.status(pipe).active_steps == active > 0


@REST
@pytest.mark.parametrize("dtype,steps", [(torch.float64, 8)])  # in float32 rounding comes to choose other tokens
def test_sdxl_diversity(serve, dtype, steps):
    call = SDXL_CALL | {"num_inference_steps": steps}
    twin = serve(dtype)(SDXL_NAME)
    pipe, plain, merged = sdxl_script(SDXL_SETTINGS, num_inference_steps=steps)
    theirs_plain = drawn(twin, call)
    theirs, active = expected(twin, call, 800, 950, 1.5, 0.7, blocks=("up_blocks",), min_grid=32)
    check(merged, plain, theirs, theirs_plain)
    assert negengine.status(pipe).active_steps == active > 0


def asset(side):
    """A picture of the generated size to be avoided, and what of it: a disc."""
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).ellipse([side * 0.1, side * 0.1, side * 0.8, side * 0.7], fill=255)
    return picture(4, (side, side)), mask


@REST
@pytest.mark.parametrize("family,dtype", [("flux", torch.float32), ("sdxl", torch.float64), ("flux", torch.float64)])
def test_away_from_a_picture_behind_a_mask(serve, family, dtype):
    """The asset takes the place of image 0 in the release, and joins the batch here: the others are compared."""
    script, name, call = (flux_script, FLUX_NAME, FLUX_CALL) if family == "flux" else (sdxl_script, SDXL_NAME, SDXL_CALL)
    changes = {"num_inference_steps": 6, "num_images_per_prompt": 2}
    given, mask = asset(call["height"])
    settings = {"use_rag_assets": True, "rag_assets": [(given, mask)], "noise_rag": False, "merging_t_end": 700}
    twin = serve(dtype)(name)
    pipe, plain, merged = script(settings, **changes)
    theirs_plain = drawn(twin, call | changes)
    defaults = {"flux": FluxArgs, "sdxl": SDXLArgs}[family]()
    greys = torch.from_numpy(np.array(mask).astype(float) / 255)[None, None]
    more = {"blocks": ("up_blocks",), "min_grid": 32} if family == "sdxl" else {}
    theirs, active = expected(
        twin,
        call | changes,
        700,
        1000,
        defaults.merging_alpha,
        defaults.merging_threshold,
        asset=encoded(twin, given),
        mask=greys,
        **more,
    )
    check(merged[1:], plain[1:], theirs[1:], theirs_plain[1:], least=2)
    assert negengine.status(pipe).active_steps == active
