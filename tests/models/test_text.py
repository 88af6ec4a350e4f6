"""Tokenizers take any text and keep the words of the grammar whole; the pooled state belongs to the whole prompt."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from negengine import models
from negengine.models import prompts
from negengine.models.people.world import WORLD

TEXTS = ["", "xylophone", "SEVEN", "Ünïcödé 漢字 🙂", "<|endoftext|> </s>", "a handwritten seven " * 300, "\t\n", "7!7"]


@pytest.fixture(params=["tokenizer", "tokenizer_2"])
def tokenizer(pipeline: DiffusionPipeline, request: pytest.FixtureRequest):
    return getattr(pipeline, request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_encoded(pipeline: DiffusionPipeline, name: str, text: str) -> None:
    settings = models.preset(name).call_kwargs() | {"num_inference_steps": 1, "output_type": "pt"}
    assert pipeline(text, **settings).images.isfinite().all()


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_fits_and_ends(tokenizer, text: str) -> None:
    ids = tokenizer(text, padding="max_length", max_length=16, truncation=True).input_ids
    assert len(ids) == 16
    assert tokenizer.eos_token_id in ids
    assert max(ids) < len(tokenizer)


def test_words_of_the_grammar_are_single_tokens(tokenizer, name: str) -> None:
    specials = len(tokenizer("").input_ids)
    words = prompts.vocabulary() if name in models.DIGITS else [word for word in WORLD.vocabulary if "-" not in word]
    for word in words:
        assert len(tokenizer(word).input_ids) - specials == 1, word


def test_unknown_words_are_spelt_not_lost(tokenizer) -> None:
    specials = set(tokenizer("").input_ids) | {tokenizer.unk_token_id}
    spelt, other = tokenizer("xylo").input_ids, tokenizer("xyla").input_ids
    assert set(spelt[:-1]) - specials
    assert spelt != other


def test_clip_ignores_case(pipeline: DiffusionPipeline, name: str) -> None:
    text = models.prompts_of(name)[7]
    assert pipeline.tokenizer(text.title()).input_ids == pipeline.tokenizer(text.upper()).input_ids
    assert pipeline.tokenizer(text.title()).input_ids == pipeline.tokenizer(text).input_ids


def test_pooled_state_is_taken_at_the_end_token(pipeline: DiffusionPipeline) -> None:
    encoder = pipeline.text_encoder
    assert encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id != 2
    ids = pipeline.tokenizer(["the digit 7"], padding="max_length", max_length=32, return_tensors="pt").input_ids
    output = encoder(ids)
    end = ids[0].tolist().index(pipeline.tokenizer.eos_token_id)
    assert end > 0
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, end])


def test_prompts_are_true_and_open_ones_name_no_digit() -> None:
    labels = torch.arange(10).repeat(30)
    styles = [("thin", "slanted")] * 300
    generator = torch.Generator().manual_seed(0)
    named = prompts.write(labels, styles, generator, open_share=0.0)
    for label, prompt in zip(labels.tolist(), named, strict=True):
        words = prompt.lower().split()
        assert (str(label) in words) != (prompts.WORDS[label] in words), prompt
    names = {*prompts.WORDS, *map(str, range(10))}
    for prompt in prompts.write(labels, styles, generator, open_share=1.0):
        assert not names & set(prompt.lower().split()), prompt
    assert all(not names & set(prompt.split()) for prompt in models.UNDER_SPECIFIED)
