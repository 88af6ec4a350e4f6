"""Calls that run in the release run here, and what it misreads is refused before the first step."""

import inspect
import logging

import diffusers
import numpy as np
import pytest
import torch
from guards import guarded
from PIL import Image
from release import PUBLISHED, SIZE, arguments, draw, literally, published, same, shared
from tiny import BUILDERS, denoiser, half_mask, picture, watched

import negengine
from negengine import compat
from negengine.compat.arguments import beginning_with, translated


# --- calls that run in the release --------------------------------------------------------------------------------------
def test_arguments_by_position(family):
    """In the release's order, which is that of diffusers for SDXL alone; and settings come last."""
    pipe = shared(family)
    height, width = SIZE[family]
    first, noise = ("a cat", None, height, width, 3), torch.Generator()
    settings = (True, arguments(family))
    if family == "flux":
        middle = (None, 4.0, 2, noise, None, None, None, "latent", True, None, None, ["latents"], 16)
        named = {"guidance_scale": 4.0, "max_sequence_length": 16}
    else:
        middle = (None, None, None, 4.0, "dull", None, 2, 0.0, noise, *[None] * 7, "latent", True, None, 0.0, None, (0, 0), None)
        middle += (None, (0, 0), None, None, None, ["latents"], 0)
        named = {"guidance_scale": 4.0, "negative_prompt": "dull"}
        assert pipe._positional[:-3] == tuple(inspect.signature(diffusers.StableDiffusionXLPipeline.__call__).parameters)[1:-1]
    noise.manual_seed(3)
    by_position = pipe(*first, *middle, *settings).images
    merge = {"use_negtome": True, "negtome_args": arguments(family)}
    assert torch.equal(by_position, draw(pipe, num_images_per_prompt=2, **named, **merge))
    assert negengine.status(pipe)[negengine.NegToMe].merged_tokens
    with pytest.raises(TypeError, match=r"takes (20|37) arguments by position, got (21|38)"):
        pipe(*first, *middle, *settings, None)
    with pytest.raises(TypeError, match="got prompt by position and by name"):
        pipe("a cat", prompt="a dog")


BLOCKS = [
    ["up_blocks"],
    "up_blocks",
    ["up"],
    ["up_blocks."],
    ("up_blocks.1",),
    pytest.param({"mid_block", "down"}, id="a set"),
    [""],
    "up",
    [],
]


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_blocks_are_beginnings_of_names(blocks):
    """As the release tells them, which looks at the processors' names."""
    names = list(shared("sdxl").unet.attn_processors)
    selected = [name.removesuffix(".processor") for name in names if any(name.startswith(block) for block in blocks)]
    assert beginning_with(blocks, [name.removesuffix(".processor") for name in names]) == selected
    for name in selected:
        assert beginning_with([f"{name}.processor"], [name, "other"]) == [name]


@pytest.mark.parametrize(
    "blocks", [("up_blocks.1",), pytest.param({"mid_block", "down"}, marks=pytest.mark.exhaustive, id="a set")], ids=str
)
def test_blocks_of_a_run(blocks):
    expected, pipe = literally("sdxl", blocks=tuple(blocks)), published("sdxl", torch.float64)
    plain = draw(pipe)
    same(draw(pipe, use_negtome=True, negtome_args=arguments("sdxl", blocks=blocks)), draw(expected.pipe), plain)


@pytest.mark.parametrize("side,merges", [(8.5, True), (9, True), (9.5, False), (-3, True), (torch.tensor(9), True), (10, False)])
def test_min_attn_dim_is_any_number(side, merges):
    pipe = shared("sdxl")
    draw(pipe, use_negtome=True, negtome_args=arguments("sdxl", min_attn_dim=side))
    assert bool(negengine.status(pipe)[negengine.NegToMe].merged_tokens) == merges


FORMS = [
    ({"merging_alpha": torch.tensor(0.5)}, {"merging_alpha": 0.5}),
    ({"merging_alpha": torch.tensor([[[0.5]]])}, {"merging_alpha": 0.5}),
    ({"merging_alpha": np.float32(0.5)}, {"merging_alpha": 0.5}),
    ({"merging_threshold": -2.0}, {"merging_threshold": -1.0}),
    ({"merging_threshold": float("-inf")}, {"merging_threshold": -1.0}),
    ({"merging_threshold": torch.tensor(0.75)}, {"merging_threshold": 0.75}),
    ({"merging_dropout": torch.zeros(1)}, {"merging_dropout": 0.0}),
    ({"merging_t_start": float("inf"), "merging_t_end": np.int64(400)}, {"merging_t_start": 1000, "merging_t_end": 400}),
    ({"merging_t_start": 800.0, "merging_t_end": float("-inf")}, {"merging_t_start": 800, "merging_t_end": 0}),
]


@pytest.mark.parametrize("given,plain", FORMS, ids=lambda value: ",".join(value))
def test_numbers_in_any_form(family, given, plain):
    defaults = vars(getattr(compat, family).NegtomeArgs())
    first, second = (translated({**defaults, **changes}, "first", None, ["up_blocks"], 1000) for changes in (given, plain))
    assert isinstance(first, negengine.NegToMe)
    assert first == second


@pytest.mark.parametrize("family", ["flux", pytest.param("sdxl", marks=pytest.mark.exhaustive)])
def test_an_alpha_for_each_image(family):
    expected, pipe = literally(family), published(family, torch.float64)
    alphas = torch.tensor([1.0, 0.5, -0.25])
    theirs = []
    for k, expected.alpha in enumerate(alphas.tolist()):
        theirs.append(draw(expected.pipe)[k])
    plain = draw(pipe)
    got = draw(pipe, use_negtome=True, negtome_args=arguments(family, merging_alpha=alphas.view(3, 1, 1)))
    same(got, torch.stack(theirs), plain)


NOTHING = [
    ("flux", {"num_joint_blocks": 0, "num_single_blocks": 0}, "no block is selected"),
    ("sdxl", {"blocks": []}, "no block is selected"),
    ("sdxl", {"blocks": ()}, "no block is selected"),
    *(
        (family, given, message)
        for family in PUBLISHED
        for given, message in (
            ({"merging_threshold": 1.5}, "no cosine exceeds merging_threshold=1.5"),
            ({"merging_threshold": float("inf")}, "no cosine exceeds merging_threshold=inf"),
            ({"merging_dropout": 1.0}, "merging_dropout=1 leaves every token out"),
            (
                {"merging_t_start": 300, "merging_t_end": 700},
                "no timestep is at most merging_t_start=300 and at least merging_t_end=700",
            ),
            ({"merging_t_start": 2000, "merging_t_end": 1001}, "no timestep is at most merging_t_start=2000"),
            ({"merging_t_start": -1, "merging_t_end": -5}, "no timestep is at most merging_t_start=-1"),
        )
    ),
]


@pytest.mark.parametrize("name,given,message", guarded(NOTHING, lambda name, given, message: name == "flux" or "blocks" in given))
def test_what_merges_nothing_runs_and_says_so(name, given, message, caplog):
    pipe = shared(name)
    small = {"num_inference_steps": 2, "num_images_per_prompt": 2}
    plain = draw(pipe, **small)
    assert not torch.equal(draw(pipe, use_negtome=True, negtome_args=arguments(name), **small), plain)
    with caplog.at_level(logging.WARNING, logger="negengine"):
        assert torch.equal(draw(pipe, use_negtome=True, negtome_args=arguments(name, **given), **small), plain)
    told = [record.message for record in caplog.records if record.name == "negengine"]
    assert [message in text for text in told] == [True]
    caplog.clear()
    draw(pipe, negtome_args=arguments(name, **given), **small)
    assert not [record for record in caplog.records if record.name == "negengine"]


@pytest.mark.parametrize("joint,single", [(1, 0), (0, 1), (-1, 0), (torch.tensor(1), np.int64(0)), (99, 99), (0.5, float("inf"))])
def test_counts_of_flux_blocks(joint, single):
    pipe = shared("flux")
    draw(pipe, use_negtome=True, negtome_args=arguments("flux", num_joint_blocks=joint, num_single_blocks=single))
    there = [2 if count < 0 else sum(i < count for i in range(2)) for count in (joint, single)]
    assert negengine.status(pipe)[negengine.NegToMe].blocks == sum(there)


# --- what is refused, before the first step -----------------------------------------------------------------------------
PAIR = (picture(1, (72, 72)), half_mask((72, 72)))
ASSET = {"use_rag_assets": True}
REFUSED = [
    ("sdxl", {"blocks": "up_blocks.1"}, ValueError, r"letter by letter.*blocks=\['up_blocks\.1'\]"),
    ("sdxl", {"blocks": "mid_block"}, ValueError, "letter by letter"),
    ("sdxl", {"blocks": ""}, ValueError, "letter by letter"),
    ("sdxl", {"blocks": "xyz"}, ValueError, "no attention block's name begins with 'xyz'; there are down_blocks.1, "),
    ("sdxl", {"blocks": ["up_blocks", "upblocks"]}, ValueError, "no attention block's name begins with 'upblocks'"),
    ("sdxl", {"blocks": None}, TypeError, "blocks must be a list of texts, got None"),
    ("sdxl", {"blocks": [1]}, TypeError, "blocks must be a list of texts"),
    ("sdxl", {"blocks": iter(["up_blocks"])}, TypeError, "blocks must be a list of texts"),
    ("sdxl", {"min_attn_dim": None}, TypeError, "min_attn_dim must be a number, got None"),
    ("sdxl", {"num_joint_blocks": 1}, ValueError, "unknown negtome_args num_joint_blocks; known are blocks, "),
    ("flux", {"blocks": ["x"]}, ValueError, "unknown negtome_args blocks"),
    ("sdxl", {"min_attn_dim": float("inf")}, ValueError, "min_attn_dim must be a finite number, got inf"),
    ("flux", {"num_single_blocks": None}, TypeError, "num_single_blocks must be a number, got None"),
    *(
        (family, given, error, message)
        for family in PUBLISHED
        for given, error, message in (
            ({"merging_alpha": float("nan")}, ValueError, "merging_alpha must be a finite number, got nan"),
            ({"merging_alpha": float("inf")}, ValueError, "merging_alpha must be a finite number, got inf"),
            ({"merging_alpha": "0.9"}, TypeError, "merging_alpha must be a number, got '0.9'"),
            ({"merging_alpha": torch.ones(4)}, ValueError, r"a tensor \[images, 1, 1\].*got \[4\]"),
            ({"merging_alpha": torch.ones(4, 1, 1)}, ValueError, "alpha has 4 values, one per image, but a group has 3"),
            ({"merging_threshold": float("nan")}, ValueError, "merging_threshold must be a number, got nan"),
            ({"merging_threshold": torch.ones(2)}, ValueError, "merging_threshold must be one number, got a tensor"),
            ({"merging_dropout": 1.1}, ValueError, r"merging_dropout must lie in \[0, 1\], got 1.1"),
            ({"merging_dropout": -0.1}, ValueError, r"merging_dropout must lie in \[0, 1\]"),
            ({"merging_t_end": None}, TypeError, "merging_t_end must be a number, got None"),
            (ASSET, ValueError, r"use_rag_assets needs rag_assets=\[\(image, mask\)\]"),
            ({**ASSET, "rag_assets": [PAIR, PAIR]}, ValueError, "pair, got 2: the release looks at the first alone"),
            ({**ASSET, "rag_assets": PAIR}, ValueError, "one .image, mask. pair, got 2"),
            ({**ASSET, "rag_assets": [PAIR[0]]}, ValueError, r"rag_assets must be \[\(image, mask\)\]"),
            ({**ASSET, "rag_assets": [(np.zeros((8, 8, 3)), None)]}, TypeError, "the picture in rag_assets must be a PIL"),
            ({**ASSET, "rag_assets": [(PAIR[0], np.ones((72, 72)))]}, TypeError, "the mask in rag_assets must be a PIL"),
            ({**ASSET, "rag_assets": [(PAIR[0], Image.new("L", (9, 9)))]}, ValueError, "the mask is black at the [59] x [59]"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("name,given,error,message", REFUSED)
def test_what_cannot_work_is_refused(name, given, error, message):
    pipe = shared(name)
    with watched(denoiser(pipe)) as calls, pytest.raises(error, match=message):
        draw(pipe, use_negtome=True, negtome_args=given)
    assert not calls


CALLS = [
    ({"negtome_args": [("merging_alpha", 1)]}, TypeError, "negtome_args must be a dict, got list"),
    ({"negtome_arg": {}}, TypeError, "got the unknown arguments negtome_arg, which neither the release nor diffusers uses"),
]


@pytest.mark.parametrize("given,error,message", CALLS)
def test_calls_that_are_refused(family, given, error, message):
    pipe = shared(family)
    with watched(denoiser(pipe)) as calls, pytest.raises(error, match=message):
        draw(pipe, use_negtome=True, **given)
    assert not calls


def test_flux_has_no_timesteps_and_no_seed():
    pipe = shared("flux")
    assert torch.equal(draw(pipe, timesteps=None), draw(pipe))
    with pytest.raises(ValueError, match="FLUX takes no timesteps, neither here nor in the release; give sigmas"):
        draw(pipe, timesteps=[900, 500])
    with pytest.raises(TypeError, match="unknown arguments seed"):
        draw(pipe, seed=3)


def test_arguments_of_later_releases_of_diffusers_are_passed_on():
    pipe, plain = published("flux"), BUILDERS["flux"]()
    guided = {"negative_prompt": "dull", "true_cfg_scale": 2.0, "sigmas": [1.0, 0.5]}
    assert torch.equal(draw(pipe, **guided), draw(plain, **guided))


def test_a_callback_of_old_scripts_is_called():
    steps = []
    draw(published("sdxl"), callback=lambda step, t, latents: steps.append(step), callback_steps=2)
    assert steps == [0, 2]
