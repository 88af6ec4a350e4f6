"""Small text encoders and their tokenizers, of the classes that the pipelines expect."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TypeVar

import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH = 64
LAYERS = 2
HEADS = 4
CLIP_LENGTH = 32
T5_LENGTH = 512

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"

Encoder = TypeVar("Encoder", bound=nn.Module)


def clip_tokenizer(words: Sequence[str], from_end: bool = False) -> CLIPTokenizer:
    """Byte-pair encoding in which each of ``words``, the words of the grammar, is one token and any other text falls back to bytes.

    The merges grow each word from its first letter, or ``from_end`` from its last, where no merge of one word can break
    another ("ar" of "artist" breaks "dark"). They are not trained: the trainer breaks ties at random, and the identities of
    the tokens must not change between the parts of a resumed training.
    """
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        letters = [*word[:-1], word[-1] + WORD_END]
        for end in range(1, len(letters)):
            if from_end:
                merges[letters[-end - 1], "".join(letters[-end:])] = None
            else:
                merges["".join(letters[:end]), letters[end]] = None
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet), *("".join(merge) for merge in merges), START, END]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges), model_max_length=CLIP_LENGTH)


def t5_tokenizer(words: Sequence[str]) -> T5Tokenizer:
    """Unigram pieces: each of ``words``, capitalised or not; any other text falls back to printable characters."""
    forms = {form for word in words for form in (word, word.capitalize(), word.upper())}
    specials = ["<pad>", "</s>", "<unk>"]
    characters = ["▁", *string.digits, *string.ascii_letters, *string.punctuation]
    pieces = [(token, 0.0) for token in specials]
    pieces += [(character, -20.0) for character in characters]
    pieces += [(f"▁{word}", -1.0) for word in sorted(forms)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=T5_LENGTH)


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _with_loud_embeddings(encoder: Encoder) -> Encoder:
    """Start the embeddings at half of unit deviation instead of CLIP's 0.02.

    SDXL reads a hidden state that no normalisation follows, and would begin almost deaf to the prompt.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Embedding):
            with torch.no_grad():
                module.weight.normal_(std=0.5)
    return encoder


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The first encoder of both families."""
    return _with_loud_embeddings(CLIPTextModel(_clip_config(tokenizer)))


def clip_projector(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """The second encoder of SDXL."""
    return _with_loud_embeddings(CLIPTextModelWithProjection(_clip_config(tokenizer)))


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """The second encoder of FLUX."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=2 * WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)
