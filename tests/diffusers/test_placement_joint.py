"""On the transformers beyond FLUX the plug-in gives, bit for bit, the published rule inside their attention processors."""

import functools

import pytest
import torch
from compare import assert_same, hooked, literal
from guards import guarded
from tiny import NEGATIVES, attentions, denoiser
from tiny_more import BUILDERS, FAMILIES, draw, every

import negengine
from negengine import NegToMe

MODES = [("paper", "first"), ("paper", "others"), ("paper", "previous"), ("release", "first")]
SECOND = [name for name in BUILDERS if name.partition("_")[0] in FAMILIES and "_" in name]
UNGUIDED = {
    "sd3": {"guidance_scale": 1.0},
    "qwen": {"true_cfg_scale": 1.0},
    "chroma": {"guidance_scale": 1.0},
    "flux2": {"guidance_scale": 1.0},
    "lumina": {},
}
# a negative branch in a second call
TWICE = {
    "qwen": {"true_cfg_scale": 2.5, "negative_prompt": NEGATIVES[:2]},
    "chroma": {"guidance_scale": 2.5, "negative_prompt": NEGATIVES[:2]},
    "flux2": {"guidance_scale": 2.5},
    "lumina": {"guidance_scale": 2.5, "negative_prompt": NEGATIVES[:2]},
}


@pytest.mark.parametrize(
    "family, matching, reference",
    guarded(((family, *mode) for family in FAMILIES for mode in MODES), lambda family, *mode: mode == MODES[1]),
)
def test_prompts_of_three_images(family, matching, reference):
    call = functools.partial(draw, prompts=2, n=3)
    status = assert_same(family, call, 3, matching=matching, reference=reference)
    assert status.group_size == 3


@every("qwen")
def test_without_classifier_free_guidance(family):
    assert_same(family, functools.partial(draw, **UNGUIDED[family]), 2, guided=False)


@pytest.mark.parametrize("family", guarded(((family,) for family in TWICE), lambda family: family == "qwen"))
def test_guidance_in_a_second_call(family):
    assert_same(family, functools.partial(draw, n=3, **TWICE[family]), 3, reference="others")


@pytest.mark.parametrize("builder", guarded(((name,) for name in SECOND), lambda name: name == "sd3_controlnet"))
def test_its_other_pipelines(builder):
    assert_same(builder, functools.partial(draw, n=3), 3, reference="others")


@pytest.mark.parametrize(
    "family, height, width",
    guarded(((family, *size) for family in FAMILIES for size in [(48, 144), (112, 80)]), lambda *case: False),
)
def test_sizes(family, height, width):
    assert_same(family, functools.partial(draw, height=height, width=width), 2)


@every("qwen")
def test_size_and_text_may_change_between_runs(family):
    pipe, fresh = BUILDERS[family](), BUILDERS[family]()
    other = functools.partial(draw, height=48, width=48, prompt=["a much longer prompt", "another"])
    hooked(pipe, other, timesteps=(0, 1000))
    expected, _ = hooked(fresh, draw, timesteps=(0, 1000))
    assert torch.equal(draw(pipe), expected)


@every()
def test_one_block(family):
    name = list(attentions(denoiser(BUILDERS[family]())))[-1]
    status = assert_same(family, draw, 2, blocks=(name.rpartition(".")[0],))
    assert (status.blocks, status.active_blocks) == (1, 1)


@every()
def test_alpha_of_each_image(family):
    assert_same(family, functools.partial(draw, n=3), 3, alpha=(0.5, 1.4, -0.3), reference="others")


@every("chroma")
def test_defaults_are_those_of_flux(family):
    """With no setting at all: alpha 0.9, threshold 0.65, timesteps 900 ... 1000, every block."""
    call = functools.partial(draw, num_inference_steps=8)
    expected, seed = literal(BUILDERS[family](), call, 2, alpha=0.9, threshold=0.65, timesteps=(900, 1000))
    pipe = negengine.apply(BUILDERS[family](), NegToMe())
    assert torch.equal(call(pipe, seed=seed), expected)
    status = negengine.status(pipe)[NegToMe]
    assert status.active_blocks == status.blocks == len([name for name in attentions(denoiser(pipe)) if "context" not in name])
    assert 0 < status.active_steps < 8


@every("qwen")
def test_removed_it_leaves_nothing(family):
    pipe = BUILDERS[family]()
    plain = draw(pipe)
    changed, _ = hooked(pipe, draw, timesteps=(0, 1000))
    assert not torch.equal(changed, plain)
    assert torch.equal(draw(negengine.remove(pipe)), plain)


@pytest.mark.exhaustive
def test_both_attentions_of_a_block_are_merged():
    """Stable Diffusion 3.5 medium attends to the image alone a second time; either can be chosen."""
    assert assert_same("sd3", draw, 2, blocks=("transformer_blocks.0.attn2",)).blocks == 1
    assert negengine.status(negengine.apply(BUILDERS["sd3"](), NegToMe()))[NegToMe].blocks == 4
