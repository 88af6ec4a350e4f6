"""On SDXL the plug-in gives, bit for bit, what the published placement inside attention processors gives."""

import functools

import pytest
import torch
from compare import assert_same, hooked, literal
from guards import guarded
from tiny import draw, sdxl

import negengine

MODES = [
    (matching, reference, scale)
    for matching, reference in (("paper", "first"), ("paper", "others"), ("paper", "previous"), ("release", "first"))
    for scale in (5.0, 1.0)
]


@pytest.mark.parametrize(
    "matching, reference, guidance_scale", guarded(MODES, lambda matching, reference, scale: scale > 1 or reference == "others")
)
def test_three_prompts_of_three_images(matching, reference, guidance_scale):
    call = functools.partial(draw, prompts=3, n=3, guidance_scale=guidance_scale)
    status = assert_same("sdxl", call, 3, guided=guidance_scale > 1, matching=matching, reference=reference)
    assert status.group_size == 3


@pytest.mark.parametrize("height,width", guarded([(40, 104), (88, 72), (64, 64)], lambda height, width: height == 88))
def test_sizes(height, width):
    assert_same("sdxl", functools.partial(draw, n=2, height=height, width=width), 2)


@pytest.mark.parametrize("min_grid,active", [(4, 12), (5, 4), (7, 4)])
def test_blocks_with_a_grid_shorter_than_min_grid_are_left_alone(min_grid, active):
    """Grids are 9 x 7 and 5 x 4: the shorter side decides. 8 of the 12 attentions are at the coarse level."""
    assert assert_same("sdxl", draw, 2, min_grid=min_grid).active_blocks == active


@pytest.mark.parametrize(
    "blocks", guarded([(("down_blocks",),), (("mid_block",),), (("up_blocks.1", "down_blocks.1"),)], lambda blocks: len(blocks) > 1)
)
def test_blocks(blocks):
    assert_same("sdxl", draw, 2, blocks=blocks)


@pytest.mark.parametrize("pattern,kind", [("*.attn1", "attn1"), ("*.attn2", "attn2")])
def test_self_and_cross_attention_can_be_chosen(pattern, kind):
    twin = sdxl()
    names = [name.removesuffix(".processor") for name in twin.unet.attn_processors]
    expected, seed = literal(twin, draw, 2, blocks=[name for name in names if name.endswith(kind)])
    got, _ = hooked(sdxl(), functools.partial(draw, seed=seed), blocks=(pattern,), timesteps=(0, 1000))
    assert torch.equal(got, expected)


def test_alpha_of_each_image():
    assert_same("sdxl", functools.partial(draw, n=3), 3, alpha=(0.5, 1.4, -0.3), reference="others")


def test_alpha_as_a_function_of_the_timestep():
    assert_same("sdxl", draw, 2, alpha=lambda t: 0.25 * (1 + t // 100))


def test_guidance_that_ends_mid_run():
    """A callback that turns guidance off halves the batch from there on; groups stay those of the prompts."""

    def end_guidance(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0
            tensors = {name: value.chunk(2)[-1] for name, value in tensors.items() if name != "latents"}
        return tensors

    inputs = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    call = functools.partial(draw, n=3, callback_on_step_end=end_guidance, callback_on_step_end_tensor_inputs=inputs)
    assert_same("sdxl", call, 3, guided=False)  # whole groups in either case: the halves split between groups


def test_defaults_are_those_of_the_paper():
    """With no setting at all: alpha 0.9, threshold 0.7, timesteps 800 ... 1000, up blocks of at least 32 x 32."""
    settings = {"alpha": 0.9, "threshold": 0.7, "timesteps": (800, 1000), "blocks": ("up_blocks",), "min_grid": 32}
    call = functools.partial(draw, prompts=1, height=256, width=264, num_inference_steps=6)
    expected, seed = literal(sdxl(), call, 2, **settings)
    pipe = negengine.apply(sdxl(), negengine.NegToMe())
    assert torch.equal(call(pipe, seed=seed), expected)
    status = negengine.status(pipe)[negengine.NegToMe]
    assert (status.blocks, status.active_blocks) == (12, 4)
    assert 0 < status.active_steps < 6
