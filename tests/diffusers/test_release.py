"""The pipelines of :mod:`negengine.compat` give what the published pipelines give."""

import diffusers
import numpy as np
import pytest
import torch
from literal_release import Release, encoded
from PIL import Image, ImageDraw
from release import arguments, draw, literally, published, same, shared
from tiny import BUILDERS, CLIP_LENGTH, half_mask, picture

import negengine
from negengine.compat.arguments import window


# --- scripts as in the README -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.exhaustive)])
def test_a_script_with_and_without(family, dtype):
    """The settings of the release's README say use_negtome False throughout; the call's own argument decides."""
    expected = literally(family, dtype)
    settings = {"use_negtome": False, **arguments(family)}
    pipe = published(family, dtype)
    shown = []
    for use_negtome in [False, True]:
        call = {"generator": torch.Generator(pipe.device).manual_seed(0), "use_negtome": use_negtome, "negtome_args": settings}
        shown.append(draw(pipe, output_type="pil", **call))
    theirs = draw(expected.pipe, output_type="pil", generator=torch.Generator().manual_seed(0))
    assert expected.calls
    plain, merged, theirs = (np.stack([np.asarray(image, dtype=int) for image in images]) for images in (*shown, theirs))
    assert np.abs(merged - theirs).max() <= 1
    assert np.abs(merged - plain).max() > (1 if family == "sdxl" else 0)
    assert (merged != theirs).sum() * 5 < (merged != plain).sum()


def test_latents(family):
    expected, pipe = literally(family), published(family, torch.float64)
    plain = draw(pipe)
    same(draw(pipe, use_negtome=True, negtome_args=arguments(family)), draw(expected.pipe), plain)


@pytest.mark.parametrize("key", [True, False, None])
@pytest.mark.parametrize("use_negtome", [True, False, None])
def test_the_call_decides_whether_to_merge(family, use_negtome, key):
    pipe = shared(family)
    with_key = arguments(family, **({} if key is None else {"use_negtome": key}))
    small = {"height": 48, "width": 48, "num_inference_steps": 2, "num_images_per_prompt": 2}
    draw(pipe, negtome_args=with_key, **small, **({} if use_negtome is None else {"use_negtome": use_negtome}))
    if use_negtome:
        assert negengine.status(pipe)[negengine.NegToMe].merged_tokens
    else:
        with pytest.raises(ValueError, match="no method is applied"):
            negengine.status(pipe)


@pytest.mark.parametrize(
    "prompts,n,group", [(["a cat"] * 3, 1, 3), pytest.param(["a cat"] * 2, 2, 4, marks=pytest.mark.exhaustive)]
)
def test_a_prompt_that_is_repeated_is_one_prompt(family, prompts, n, group):
    """As in the release, to which the whole batch is one group."""
    count = n * (1 if isinstance(prompts, str) else len(prompts))
    pipe, expected = published(family, torch.float64), literally(family)
    expected.n = count
    call = {"prompt": prompts, "num_images_per_prompt": n, **({"prompt_2": prompts} if family == "flux" else {})}
    plain = draw(pipe, **call)
    got = draw(pipe, use_negtome=True, negtome_args=arguments(family), **call)
    assert negengine.status(pipe)[negengine.NegToMe].group_size == group
    same(got, draw(expected.pipe, **call), plain)
    with torch.no_grad():
        length = {"max_sequence_length": CLIP_LENGTH} if family == "flux" else {}
        rows = pipe.encode_prompt("a cat", "a cat", num_images_per_prompt=count, **length)
    sides = ("", "pooled_") if family == "flux" else ("", "negative_", "pooled_", "negative_pooled_")
    embeds = {f"{side}prompt_embeds": row for side, row in zip(sides, rows, strict=False)}
    call = {"prompt": None, "num_images_per_prompt": 1, "use_negtome": True, "negtome_args": arguments(family)}
    torch.testing.assert_close(draw(pipe, **call, **embeds), got)
    assert negengine.status(pipe)[negengine.NegToMe].group_size == group


@pytest.mark.parametrize(
    "prompts,n,group",
    [(["a cat", "a cat", "a dog", "a dog"], 1, 2), (["a cat", "a cat", "a dog"], 2, 2)],
)
def test_prompts_that_differ_have_each_a_first_image(family, prompts, n, group):
    pipe = shared(family)
    draw(pipe, prompt=prompts, num_images_per_prompt=n, use_negtome=True, negtome_args=arguments(family))
    report = negengine.status(pipe)[negengine.NegToMe]
    assert report.group_size == group
    assert report.merged_tokens


# --- the window ---------------------------------------------------------------------------------------------------------
def flux_schedule(size=1024, steps=50):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    tokens = (size // 16) ** 2
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.timesteps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("low,high", [(900, 1000), (850, 990), (901.5, 998.25), (899, 899.5), (902, 998), (-5, 3000)])
def test_timesteps_are_rounded_before_they_are_compared(low, high, dtype):
    unrounded = window(low, high, 1000, dtype) or (1, 0)
    differing = 0
    for size in range(256, 2049, 128):
        for steps in (4, 20, 25, 28, 30, 40, 50):
            t = flux_schedule(size, steps)
            told = t.to(dtype).double()
            merging = (low <= told) & (told <= high)
            assert torch.equal(merging, (unrounded[0] <= t.double()) & (t.double() <= unrounded[1]))
            differing += int((merging != ((low <= t) & (t <= high))).any())
    assert not differing or dtype in (torch.bfloat16, torch.float16)
    assert differing or dtype != torch.bfloat16 or (low, high) != (900, 1000)


@pytest.mark.parametrize("dtype,active", [pytest.param(torch.float32, 13, marks=pytest.mark.exhaustive), (torch.bfloat16, 14)])
def test_the_window_of_a_run_is_that_of_its_dtype(dtype, active):
    """At 1024 x 1024 and 50 steps one timestep is 899.887, in bfloat16 900."""
    pipe = published("flux", dtype)
    # the shift of 1024 x 1024, for pictures of any size
    config = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 1.15, "max_shift": 1.15}
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    call = {"num_inference_steps": 50, "num_images_per_prompt": 2, "height": 32, "width": 32}
    draw(pipe, use_negtome=True, **call)
    assert negengine.status(pipe)[negengine.NegToMe].active_steps == active
    theirs = Release(BUILDERS["flux"]().to(dtype), 2, 900, 1000, 0.9, 0.65)
    theirs.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    draw(theirs.pipe, **call)
    assert sum(theirs.active) == active
    embeds = {"prompt_embeds": torch.zeros(2, 5, 32, dtype=dtype), "pooled_prompt_embeds": torch.zeros(2, 32, dtype=dtype)}
    draw(pipe, use_negtome=True, **{**call, "prompt": None, "num_images_per_prompt": 1, **embeds})
    assert negengine.status(pipe)[negengine.NegToMe].active_steps == active


def test_sdxl_compares_the_timestep_as_it_is():
    """The scheduler's, of which Euler's fractions are not rounded to the latents' dtype; 898.2 would become 896 or 900."""
    pipe = published("sdxl", torch.bfloat16)
    pipe.scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipe.scheduler.set_timesteps(12)
    t = pipe.scheduler.timesteps[1].item()
    assert t != round(t)
    small = {"height": 32, "width": 32, "num_inference_steps": 12, "num_images_per_prompt": 2}
    for low, active in ((t, 2), (t + 1e-3, 1)):
        draw(pipe, use_negtome=True, negtome_args=arguments("sdxl", merging_t_end=low), **small)
        assert negengine.status(pipe)[negengine.NegToMe].active_steps == active


def test_the_window_is_of_the_schedulers_own_timesteps(family):
    """A scheduler of 500 training timesteps counts from 500 down, and the published code compares that."""
    pipe = published(family)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, num_train_timesteps=500)
    draw(pipe, num_inference_steps=5, use_negtome=True, negtome_args=arguments(family, merging_t_end=300))
    t = pipe.scheduler.timesteps
    assert t.max() <= 500
    assert negengine.status(pipe)[negengine.NegToMe].active_steps == (t >= 300).sum()


# --- given pictures -----------------------------------------------------------------------------------------------------
def disc(size, grey=255):
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).ellipse([size[0] * 0.1, size[1] * 0.15, size[0] * 0.8, size[1] * 0.85], fill=grey)
    return mask


def speckled(size):
    return Image.fromarray(np.random.default_rng(1).integers(0, 3, (size[1], size[0]), dtype=np.uint8))


MASKS = {
    "as large as the picture": disc,
    "dark grey, of another size": lambda size: disc((61, 97), 3),
    "speckled": speckled,
    "in colour": lambda size: disc(size).convert("RGB"),
    "white": lambda size: Image.new("L", size, 255),
}


@pytest.mark.parametrize(
    "kind,side",
    [
        ("dark grey, of another size", 136),
        *(pytest.param(kind, 136, marks=pytest.mark.exhaustive) for kind in MASKS if not kind.startswith("dark")),
        pytest.param("as large as the picture", 264, marks=pytest.mark.exhaustive),
    ],
)
def test_masks(family, kind, side):
    """By way of the latents, all greys but black; image 0, whose place the picture takes there, is not compared."""
    side = side // 16 * 16 if family == "flux" else side
    size = {"height": side, "width": side, "num_inference_steps": 2, "num_images_per_prompt": 2}
    given, mask = picture(4, (side, side)), MASKS[kind]((side, side))
    pipe = published(family, torch.float64)
    plain = draw(pipe, **size)
    greys = torch.from_numpy(np.array(mask.convert("L")).astype(float) / 255)[None, None]
    expected = literally(family, asset=encoded(pipe, given), mask=greys)
    expected.n = 2
    settings = arguments(family, use_rag_assets=True, rag_assets=[(given, mask)])
    got, theirs = draw(pipe, use_negtome=True, negtome_args=settings, **size), draw(expected.pipe, **size)
    torch.testing.assert_close(got[1:], theirs[1:], rtol=1e-4, atol=1e-5)  # the picture is encoded in float32
    assert (got - plain)[1:].abs().amax(tuple(range(1, got.ndim))).min() > 1e-3


@pytest.mark.parametrize("changed", ["picture", "VAE", pytest.param("mask", marks=pytest.mark.exhaustive)])
def test_an_asset_is_looked_at_anew_in_every_call(family, changed):
    given, mask = picture(4, (72, 72)), disc((72, 72))
    pipe = published(family)
    settings = arguments(family, use_rag_assets=True, rag_assets=[(given, mask)])
    call = {"use_negtome": True, "negtome_args": settings, "num_inference_steps": 2, "num_images_per_prompt": 2}
    before = draw(pipe, **call)
    assert torch.equal(draw(pipe, **call), before)
    if changed == "picture":
        given.paste((255, 0, 0), (0, 0, 60, 60))
    elif changed == "mask":
        mask.paste(255, (0, 0, 72, 72))
    else:
        with torch.random.fork_rng():
            torch.manual_seed(9)
            pipe.vae = diffusers.AutoencoderKL.from_config(pipe.vae.config).eval()
    after = draw(pipe, **call)
    assert not torch.equal(after, before)
    fresh = published(family)
    fresh.vae = pipe.vae
    assert torch.equal(draw(fresh, **call), after)


def test_what_is_transparent_in_an_asset_is_not_avoided():
    pipe, opaque = shared("flux"), picture(4, (80, 80))
    mask = half_mask((80, 80))
    transparent = opaque.copy()
    transparent.putalpha(mask)
    drawn = []
    for asset in ((transparent, None), (opaque, mask), (opaque, None)):
        settings = arguments("flux", use_rag_assets=True, rag_assets=[asset])
        drawn.append(draw(pipe, use_negtome=True, negtome_args=settings))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
