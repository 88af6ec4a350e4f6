"""A tiny, random pipeline of Lumina-Image 2.0."""

from __future__ import annotations

import diffusers
import tiny
import torch
from tiny import WIDTH
from transformers import Gemma2Config, Gemma2Model

LUMINA = {
    "sample_size": 16,
    "in_channels": 4,
    "hidden_size": 32,
    "num_layers": 3,
    "num_refiner_layers": 2,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 8,
    "axes_dim_rope": (4, 4, 8),
    "axes_lens": (300, 16, 16),
    "cap_feat_dim": WIDTH,
}
CALL = {"guidance_scale": 1.0, "max_sequence_length": 40, "system_prompt": "draw"}


def lumina(seed=0, **overrides):
    """A Lumina2Pipeline of 2 blocks for the text, 2 for the image and 3 for both; texts have a token more than letters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = tiny._t5_tokenizer()
        config = Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
        pipe = diffusers.Lumina2Pipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny._vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
            text_encoder=Gemma2Model(config),
            tokenizer=tokenizer,
            transformer=diffusers.Lumina2Transformer2DModel(**{**LUMINA, **overrides}),
        )
    return pipe
