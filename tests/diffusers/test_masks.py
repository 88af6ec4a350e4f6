"""Pipelines that give images of one prompt the masks of other prompts: negengine changes nothing of it, and says so."""

import functools
import inspect

import pytest
import torch
from guards import guarded
from tiny import kind
from tiny_more import BUILDERS, CALL, draw

import negengine
from negengine.diffusers.families import find_denoiser
from negengine.diffusers.families.chroma import CHROMA
from negengine.diffusers.families.lumina import LUMINA
from negengine.diffusers.masks import mixed

PUSHED = negengine.NegToMe(timesteps=(0, 1000), threshold=-1)
UNLIKE, ALIKE = ["a cat", "a longer text"], ["a cat", "a dog"]
FAMILIES = pytest.mark.parametrize("family", ["qwen", "lumina"])
PIPELINES = ["qwen", "lumina", "qwen_img2img", "qwen_controlnet", "chroma", "chroma_img2img"]
SCALES = {"qwen": "true_cfg_scale", "lumina": "guidance_scale"}


def warned(caplog, pipe, **call):
    """What was said of masks in a call of a pipeline with a method on it."""
    caplog.clear()
    draw(negengine.apply(pipe, PUSHED), num_inference_steps=1, **call)
    return [message for message in caplog.messages if "masks of other prompts" in message]


def repeating_masks(pipe, repeat):
    """A pipeline that repeats its masks so for several images of a prompt, whatever its class does in this diffusers."""
    encode = pipe.encode_prompt

    @functools.wraps(encode)
    def encode_prompt(*args, num_images_per_prompt=1, **options):
        n, encoded = num_images_per_prompt, encode(*args, num_images_per_prompt=1, **options)
        texts = [part is not None and part.ndim == 3 for part in encoded]
        pairs = zip(encoded, texts, strict=True)
        return tuple(part if part is None else part.repeat_interleave(n, 0) if text else repeat(part, n) for part, text in pairs)

    pipe.encode_prompt = encode_prompt
    return pipe


def out_of_order(mask, n):
    return mask.repeat(n, 1)


def in_order(mask, n):
    return mask.repeat_interleave(n, 0)


@FAMILIES
def test_masks_of_other_prompts_are_warned_of(family, caplog):
    pipe = repeating_masks(BUILDERS[family](), out_of_order)
    (warning,) = warned(caplog, pipe, prompt=UNLIKE)
    assert warning.startswith(f"{type(pipe).__name__} gave images of one prompt the masks of other prompts")
    assert "Give the prompts one call each" in warning
    assert [warned(caplog, pipe, **call) for call in ({"prompt": UNLIKE, "n": 1}, {"prompt": ALIKE}, {"prompt": UNLIKE[0]})] == [
        []
    ] * 3


@FAMILIES
def test_masks_of_other_negative_prompts_are_warned_of(family, caplog):
    pipe = repeating_masks(BUILDERS[family](), out_of_order)
    assert len(warned(caplog, pipe, prompt=ALIKE, negative_prompt=UNLIKE, **{SCALES[family]: 3.0})) == 1


@FAMILIES
def test_nothing_is_said_where_a_pipeline_has_been_mended(family, caplog):
    pipe = repeating_masks(BUILDERS[family](), in_order)
    assert warned(caplog, pipe, prompt=UNLIKE, negative_prompt=UNLIKE[::-1], **{SCALES[family]: 3.0}) == []


def encoded(pipe, n=1):
    """What the prompts become in a call, by the denoiser's names."""
    known = inspect.signature(pipe.encode_prompt).parameters
    options = {name: value for name, value in CALL[kind(pipe)].items() if name in known}
    with torch.no_grad():
        return find_denoiser(pipe)[1].conditioning.prompts(pipe.encode_prompt(UNLIKE, num_images_per_prompt=n, **options))


def test_embeddings_that_a_pipeline_repeats_are_looked_at(caplog):
    pipe = BUILDERS["lumina"]()
    given = dict(zip(("prompt_embeds", "prompt_attention_mask"), encoded(pipe).values(), strict=True))
    assert len(warned(caplog, repeating_masks(pipe, out_of_order), prompt=None, **given)) == 1


def test_embeddings_that_stay_as_they_were_given_are_left_alone():
    """Their rows, an odd number here, are not those of prompts."""
    texts, mask = torch.zeros(3, 3, 8), torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    n = {"num_images_per_prompt": 3}
    assert not mixed(CHROMA.conditioning, {**n, "prompt_embeds": texts[:2]}, (texts[:2], None, mask[:2]))
    assert not mixed(LUMINA.conditioning, {**n, "negative_prompt_embeds": texts}, (texts, mask[[0, 0, 0]], texts, mask))
    assert mixed(LUMINA.conditioning, {**n, "prompt_embeds": texts[:1]}, (texts, mask, None, None))


@pytest.mark.parametrize("name", guarded(((name,) for name in PIPELINES), lambda name: name in ("qwen", "lumina", "chroma")))
def test_pipelines_of_diffusers_are_warned_of_where_they_are_wrong(name, caplog):
    pipe = BUILDERS[name]()
    mask = find_denoiser(pipe)[1].conditioning.mask
    one, two = encoded(pipe)[mask], encoded(pipe, n=2)[mask]
    assert bool(warned(caplog, pipe, prompt=UNLIKE)) == (not torch.equal(two, one.repeat_interleave(2, 0)))
