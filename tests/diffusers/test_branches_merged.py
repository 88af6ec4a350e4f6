"""NegToMe beside branches that a method joins: what it does to the branches of the pipeline's own guidance, and no more."""

import itertools

import pytest
import tiny
import tiny_more
import tiny_z_image
import torch
from guards import guarded

import negengine
from negengine import DynamicNegativeGuidance, NegativePrompting, NegToMe

AVOID = "noise"
HALVES = {"guidance_scale": 1.0, "negative_prompt": None}
# calls guided by the pipeline, calls that are not, and the scale of the push that is the same
CALLS = {
    "flux": ({"true_cfg_scale": 3.0}, {}, 2.0),
    "sd": ({"guidance_scale": 3.0}, HALVES, 2.0),
    "sdxl": ({"guidance_scale": 3.0}, HALVES, 2.0),
    "sd3": ({"guidance_scale": 3.0}, HALVES, 2.0),
    "chroma": ({"guidance_scale": 3.0}, {"guidance_scale": 1.0}, 2.0),
    "flux2": ({"guidance_scale": 3.0}, {"guidance_scale": 1.0}, 2.0),
    "lumina": ({"guidance_scale": 3.0, "cfg_normalization": False}, {"guidance_scale": 1.0}, 2.0),
    "z_image": ({"guidance_scale": 2.0}, {"guidance_scale": 0.0, "negative_prompt": None}, 2.0),
}
GUARDS = (("sd3", "first"), ("sdxl", "picture"), ("chroma", "picture"))


def merging(reference):
    picture = negengine.ReferenceImage(tiny.picture(3), mask=tiny.half_mask())
    given = picture if reference == "picture" else reference
    return NegToMe(reference=given, timesteps=(0, 1000), threshold=0.3, min_grid=1)


def draw(pipe, **call):
    kind = tiny.kind(pipe)
    module = tiny_z_image if kind == "z_image" else tiny_more if kind in tiny_more.FAMILIES else tiny
    return module.draw(pipe, **{"prompts": 1, "n": 2, **call})


def guided(pipe, call):
    """By the pipeline, away from what the methods here avoid."""
    return draw(pipe, **call, **tiny_more.against(pipe, [AVOID]))


def build(family):
    return tiny_z_image.OWN[family](0) if family == "z_image" else tiny_more.BUILDERS[family](0)


@pytest.mark.parametrize(
    "family, reference",
    guarded(itertools.product(CALLS, ("first", "others", "picture")), lambda *case: case in GUARDS),
)
def test_negative_prompting_is_the_guidance_of_the_pipeline(family, reference):
    """Both are ``e - s (e_neg - e)``: merging must move them alike, else it is multiplied by the strength of the push."""
    own, alone, scale = CALLS[family]
    pipe = build(family)
    plain = guided(pipe, own)
    expected = guided(negengine.apply(pipe, merging(reference)), own)
    tokens = negengine.status(pipe)[NegToMe]
    got = draw(negengine.apply(pipe, NegativePrompting(prompt=AVOID, scale=scale)), **alone)
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)
    found = negengine.status(pipe)[NegToMe]
    assert found.eligible_tokens == tokens.eligible_tokens
    assert abs(found.merged_tokens - tokens.merged_tokens) < tokens.eligible_tokens / 1000  # near ties


@pytest.mark.parametrize("reference", ["first", "picture"])
def test_an_unconditional_branch_of_the_methods_own(reference):
    """Chroma guides in a second call, the method in the same one: without a push they are the same."""
    pipe = negengine.apply(build("chroma"), merging(reference))
    expected = guided(pipe, {"guidance_scale": 3.0})
    method = DynamicNegativeGuidance(prompt="a dog", cfg=3.0, cfg_prompt=AVOID, scale=0.0, surrogate="ancestral")
    got = draw(negengine.apply(pipe, method), guidance_scale=1.0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)


def test_rows_that_nag_joins_come_after_all_branches():
    """Whatever the order in which methods are applied."""
    nag = negengine.NormalizedAttentionGuidance(negative_prompt="dull", timesteps=(0, 1000))
    methods = (nag, merging("picture"), NegativePrompting(prompt=AVOID))
    drawn = [draw(negengine.apply(build("sd3"), *order), **HALVES) for order in (methods, methods[::-1])]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn[0], draw(negengine.apply(build("sd3"), *methods[1:]), **HALVES), atol=1e-2)


RECORDED = CALLS | {"qwen": ({"true_cfg_scale": 3.0}, {}, 2.0)}
TRANSFORMERS = [name for name in RECORDED if name not in ("sd", "sdxl", "flux")]


@pytest.mark.parametrize("family", guarded(((name,) for name in TRANSFORMERS), lambda name: name in ("sd3", "chroma")))
def test_a_bank_gives_branches_what_was_recorded_for_the_unconditional_one(family, tmp_path):
    """Recorded under the prompt that is avoided, it is the picture."""
    pipe, picture = build(family), merging("picture")
    own, alone, scale = RECORDED[family]
    usual = {} if family == "z_image" else tiny_more.CALL[family]
    size = tiny_z_image.SIZE if family == "z_image" else tiny_more.SIZE[family]
    call = {**usual, **size, **own, **tiny_more.against(pipe, [AVOID]), "prompt": tiny.PROMPTS[0], "num_inference_steps": 3}
    if isinstance(call.get("negative_prompt"), list):
        call["negative_prompt"] = AVOID
    bank = negengine.record_bank(pipe, picture, tmp_path / "bank.safetensors", **call)
    expected = draw(negengine.apply(pipe, picture, NegativePrompting(prompt=AVOID, scale=scale)), **alone)
    got = draw(negengine.apply(pipe, NegToMe(reference=bank, timesteps=(0, 1000), threshold=0.3)), **alone)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("reference", ["first", "picture"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_compiled(family, reference):
    """Two runs of one shape: what was compiled in the first serves the second."""
    alone = RECORDED[family][1]
    methods = merging(reference), NegativePrompting(prompt=AVOID)
    expected = draw(negengine.apply(build(family), *methods), **alone)
    torch._dynamo.reset()
    pipe = negengine.apply(build(family), *methods)
    for block in next(iter(child for child in pipe.transformer.children() if isinstance(child, torch.nn.ModuleList))):
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(draw(pipe, **alone), expected, rtol=1e-4, atol=2e-4)
    counter = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counter > 0
    draw(pipe, seed=3, **alone)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counter
