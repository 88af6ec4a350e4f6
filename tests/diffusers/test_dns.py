"""The negative image against a loop written out in float64, and the chain of image, caption and final image."""

import copy

import pytest
import torch
from literal_dns import literal
from tiny_dns import BUILDERS, CALL, PROMPTS, SEEDS, STEPS, W, Watch, encoded, kind, prompting, sd, words, zeroed

import negengine
from negengine.methods import DiffusionNegativePrompt


def distance(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("builder", BUILDERS)
def test_the_negative_image_is_that_of_the_literal_loop(builder):
    pipe = BUILDERS[builder]()
    watch = Watch(pipe)
    call = {**CALL[kind(pipe)], **({"guidance_scale": 3.5} if kind(pipe) == "flux" else {})}
    images = negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **call)
    (got,) = watch.decoded
    assert [image.size for image in images] == [(48, 32)] * 2
    assert distance(got, literal(pipe, PROMPTS, SEEDS, W)) < 2e-5
    assert distance(got, literal(pipe, PROMPTS, SEEDS, W, swapped=False)) > 1e-3  # the comparison can tell
    assert distance(got, literal(pipe, PROMPTS, SEEDS, W + 0.1)) > 2e-4


@pytest.mark.parametrize("builder", ["sd", "flux"])
def test_steps_and_guidance_stand_in_for_those_of_the_call(builder):
    pipe = BUILDERS[builder]()
    call = CALL[kind(pipe)]
    expected = negengine.diffusion_negative_image(pipe, "a cat", seed=5, **call)
    scale = "true_cfg_scale" if kind(pipe) == "flux" else "guidance_scale"
    got = negengine.diffusion_negative_image(
        pipe, "a cat", seed=5, steps=STEPS, guidance=W, **{**call, "num_inference_steps": 9, scale: 1.0}
    )
    assert [image.tobytes() for image in got] == [image.tobytes() for image in expected]


def test_the_null_branch_is_what_the_call_makes_it():
    """An SDXL that is given an empty negative prompt has its encoding, not zeros, for its unconditional branch."""
    zeros, empty = Watch(pipe := zeroed()), Watch(twin := encoded())
    negengine.diffusion_negative_image(pipe, "a cat", seed=5, negative_prompt="", **CALL["sdxl"])
    negengine.diffusion_negative_image(twin, "a cat", seed=5, **CALL["sdxl"])
    negengine.diffusion_negative_image(pipe, "a cat", seed=5, **CALL["sdxl"])
    assert torch.equal(zeros.decoded[0], empty.decoded[0])
    assert not torch.equal(zeros.decoded[0], zeros.decoded[1])


def test_every_argument_of_the_text_encoders_reaches_them():
    """``prompt_2`` and ``clip_skip`` as the pipeline itself would have used them: at scale w the branches tell which is which."""
    pipe = zeroed()
    watch = Watch(pipe)
    further = {"prompt_2": "the sea", "clip_skip": 0}
    negengine.diffusion_negative_image(pipe, "a cat", seed=5, **further, **CALL["sdxl"])
    swap = pipe.encode_prompt

    def swapped(**kwargs):
        e, n, pooled, none = swap(**kwargs)
        return n, e, none, pooled

    pipe.encode_prompt = swapped
    pipe("a cat", generator=[torch.Generator().manual_seed(5)], **further, **CALL["sdxl"])
    assert torch.equal(watch.decoded[0], watch.decoded[1])


@pytest.mark.parametrize("builder", ["sdxl, zeros", "flux"])
def test_the_chain_is_its_parts(builder):
    pipe = BUILDERS[builder]()
    watch = Watch(pipe)
    records = prompting(pipe)
    assert torch.equal(watch.first[0], watch.first[1])  # the same noise in both runs
    pictures = negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **CALL[kind(pipe)])
    captions = [words(picture) for picture in pictures]
    assert [record.negative_image.tobytes() for record in records] == [picture.tobytes() for picture in pictures]
    assert [record.caption for record in records] == captions == [record.negative_prompt for record in records]
    finals = pipe(
        PROMPTS, negative_prompt=captions, generator=[torch.Generator().manual_seed(s) for s in SEEDS], **CALL[kind(pipe)]
    )
    assert [record.images[0].tobytes() for record in records] == [image.tobytes() for image in finals.images]
    assert [(record.prompt, record.seed) for record in records] == list(zip(PROMPTS, SEEDS, strict=True))


@pytest.mark.parametrize(
    "own, keep_own, expected",
    [
        ("dull", True, ["dull, sea", "dull, sea"]),
        (["dull", ""], True, ["dull, sea", "sea"]),
        ("dull", False, ["sea", "sea"]),
        (None, True, ["sea", "sea"]),
    ],
)
def test_the_users_own_negative_prompt_stands_beside_the_caption(own, keep_own, expected):
    pipe = zeroed()
    watch = Watch(pipe)
    records = prompting(pipe, captioner=lambda image: " sea\n", keep_own=keep_own, negative_prompt=own)
    assert [record.negative_prompt for record in records] == expected
    negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **CALL["sdxl"])
    assert torch.equal(watch.decoded[0], watch.decoded[2])  # and not in the negative image
    pipe(PROMPTS, negative_prompt=expected, generator=[torch.Generator().manual_seed(s) for s in SEEDS], **CALL["sdxl"])
    assert torch.equal(watch.decoded[1], watch.decoded[3])


def test_several_images_of_a_prompt_have_seeds_that_count_on():
    pipe = sd()
    records = prompting(pipe, num_images_per_prompt=2)
    assert [len(record.images) for record in records] == [2, 2]
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 11, 12)]
    captions = [record.caption for record in records]
    images = pipe(PROMPTS, negative_prompt=captions, num_images_per_prompt=2, generator=generators, **CALL["sd"]).images
    assert [image.tobytes() for record in records for image in record.images] == [image.tobytes() for image in images]


def test_methods_act_in_the_final_run_only_and_are_there_afterwards():
    pipe = zeroed()
    call = {**CALL["sdxl"], "height": 64, "width": 64}
    method = negengine.NegToMe(alpha=0.9, threshold=-1, timesteps=(0, 1000), blocks=("*",), min_grid=1, group_size=2)
    plain = negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **call)
    settings = DiffusionNegativePrompt(captioner=lambda image: "sea")
    bare = negengine.diffusion_negative_prompting(pipe, PROMPTS, settings, seed=SEEDS, **call)
    negengine.apply(pipe, method)
    hooks = dict(pipe.unet._forward_pre_hooks)
    with_method = negengine.diffusion_negative_prompting(pipe, PROMPTS, settings, seed=SEEDS, **call)
    for record, other, picture in zip(with_method, bare, plain, strict=True):
        assert record.negative_image.tobytes() == picture.tobytes() == other.negative_image.tobytes()
    assert with_method[0].images[0].tobytes() == bare[0].images[0].tobytes()  # the reference of the others
    assert with_method[1].images[0].tobytes() != bare[1].images[0].tobytes()
    report = negengine.status(pipe)[negengine.NegToMe]
    before = str(report)
    negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **call)
    assert str(negengine.status(pipe)[negengine.NegToMe]) == before  # not a run of the method
    assert dict(pipe.unet._forward_pre_hooks) == hooks  # compiled code would have to be compiled anew
    negengine.remove(pipe)
    for name in ("encode_prompt", "prepare_latents", "check_inputs", "maybe_free_model_hooks"):
        assert name not in vars(pipe)
    assert "step" not in vars(pipe.scheduler)


def test_methods_are_there_again_after_an_error():
    pipe = sd()
    negengine.apply(pipe, negengine.NegToMe(threshold=-1, timesteps=(0, 1000), min_grid=1, group_size=2))
    with pytest.raises(ValueError, match="divisible by 8"):
        negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **CALL["sd"] | {"height": 33})
    pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **CALL["sd"])
    assert negengine.status(pipe)[negengine.NegToMe].merged_tokens


@torch.no_grad()
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_method_on_the_bare_denoiser_is_not_lost(scheduled):
    pipe = sd()
    scheduler = copy.deepcopy(pipe.scheduler) if scheduled else None
    method = negengine.NegToMe(threshold=-1, timesteps=(0, 1000), min_grid=1, group_size=2)
    negengine.apply(pipe.unet, method, scheduler=scheduler)
    watch = Watch(pipe)
    negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **CALL["sd"])
    if scheduled:
        scheduler.set_timesteps(3)  # heard again
    x, states = torch.randn(2, 4, 4, 6), torch.randn(2, 16, 32)
    merged = pipe.unet(x, 3, encoder_hidden_states=states).sample
    negengine.remove(pipe.unet)
    assert not torch.equal(merged, pipe.unet(x, 3, encoder_hidden_states=states).sample)
    negengine.diffusion_negative_image(pipe, PROMPTS, seed=SEEDS, **CALL["sd"])
    assert torch.equal(*watch.decoded)
