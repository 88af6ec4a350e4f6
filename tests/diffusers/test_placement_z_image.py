"""On Z-Image the plug-in gives, bit for bit, the published rule inside its attention processor: of image tokens alone."""

import functools

import pytest
import torch
from compare import assert_same, hooked, literal
from guards import guarded
from tiny import NEGATIVES, denoiser
from tiny_z_image import LONG, OWN, draw, z_image

import negengine
from negengine import NegToMe

GUIDED = {"guidance_scale": 2.0, "negative_prompt": NEGATIVES[:2]}
MODES = [("paper", "first"), ("paper", "others"), ("paper", "previous"), ("release", "first")]
same = functools.partial(assert_same, guided=False)


@pytest.mark.parametrize("matching, reference", guarded(MODES, lambda *mode: mode == MODES[1]))
def test_prompts_of_three_images(matching, reference):
    call = functools.partial(draw, prompts=2, n=3)
    status = same("z_image", call, 3, matching=matching, reference=reference)
    assert status.group_size == 3
    assert (status.blocks, status.active_blocks) == (3, 3)


@pytest.mark.parametrize("reference", ["others", pytest.param("first", marks=pytest.mark.exhaustive)])
def test_with_classifier_free_guidance(reference):
    assert_same("z_image", functools.partial(draw, n=3, **GUIDED), 3, reference=reference)


@pytest.mark.parametrize("builder", guarded(((name,) for name in OWN if name != "z_image"), lambda name: name == "z_image_img2img"))
def test_its_other_pipelines(builder):
    assert_same(builder, functools.partial(draw, n=3, **GUIDED), 3, reference="others")


def test_texts_of_other_lengths():
    """Their tokens follow those of the image, and fill the rows of shorter texts up."""
    assert_same("z_image", functools.partial(draw, prompt=["a cat", LONG], **GUIDED), 2, reference="others")


@pytest.mark.parametrize(
    "height, width",
    [(64, 128), pytest.param(48, 144, marks=pytest.mark.exhaustive), pytest.param(112, 80, marks=pytest.mark.exhaustive)],
)
def test_sizes(height, width):
    """32 tokens, which nothing is added to; and 27 and 35."""
    same("z_image", functools.partial(draw, height=height, width=width), 2)


def test_what_fills_the_tokens_up_is_neither_merged_nor_a_source():
    """Whatever the padding tokens are: with a threshold below every cosine, all image tokens are merged and nothing else."""
    pipe, outputs = z_image(), []

    def listen():
        return (
            denoiser(pipe).layers[0].attention.to_out[0].register_forward_pre_hook(lambda m, args: outputs.append(args[0].clone()))
        )

    listen()  # before
    negengine.apply(pipe, NegToMe(threshold=-1, timesteps=(0, 1000), reference="others", blocks=("layers.0",)))
    listen()
    draw(pipe, num_inference_steps=1)
    before, after = outputs
    assert before.shape[1] == 64 + 32
    assert (before[:, :35] != after[:, :35]).any(-1).all()
    assert torch.equal(before[:, 35:], after[:, 35:])
    status = negengine.status(pipe)[NegToMe]
    assert status.merged_tokens == status.eligible_tokens == 4 * 35


def test_size_and_text_may_change_between_runs():
    pipe, fresh = z_image(), z_image()
    other = functools.partial(draw, height=48, width=48, n=3, prompt=[LONG, "another"])
    hooked(pipe, other, timesteps=(0, 1000))
    expected, _ = hooked(fresh, draw, timesteps=(0, 1000))
    assert torch.equal(draw(pipe), expected)


@pytest.mark.exhaustive
def test_one_layer_and_an_alpha_of_each_image():
    status = same("z_image", functools.partial(draw, n=3), 3, blocks=("layers.1",), alpha=(0.5, 1.4, -0.3), reference="others")
    assert (status.blocks, status.active_blocks) == (1, 1)


def test_defaults_are_those_of_flux():
    """With no setting at all: alpha 0.9, threshold 0.65, timesteps 900 ... 1000, every layer."""
    call = functools.partial(draw, num_inference_steps=7)
    expected, seed = literal(z_image(), call, 2, guided=False, alpha=0.9, threshold=0.65, timesteps=(900, 1000))
    pipe = negengine.apply(z_image(), NegToMe())
    assert torch.equal(call(pipe, seed=seed), expected)
    assert 0 < negengine.status(pipe)[NegToMe].active_steps < 7


def test_removed_it_leaves_nothing():
    pipe = z_image()
    plain = draw(pipe)
    changed, _ = hooked(pipe, draw, timesteps=(0, 1000))
    assert not torch.equal(changed, plain)
    assert torch.equal(draw(negengine.remove(pipe)), plain)
