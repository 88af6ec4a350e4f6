"""Tiny, random pipelines of FLUX.2 (dev, and klein with its guidance in two calls), with text encoders of the real classes."""

from __future__ import annotations

import string

import diffusers
import pytest
import tiny
import torch
from tiny import WIDTH
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FLUX2 = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
}
TEXT = {"max_sequence_length": 17, "text_encoder_out_layers": (1,)}  # of the calls
MODEL = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def klein(seed=0, is_distilled=False, **overrides):
    """A Flux2KleinPipeline of 2 joint and 2 single blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _letters("q{{ messages[0]['content'] }}")
        text_encoder = Qwen3ForCausalLM(Qwen3Config(**MODEL, vocab_size=len(tokenizer)))
        return _lively(
            diffusers.Flux2KleinPipeline(
                **_parts(tokenizer, text_encoder), transformer=_transformer(False, overrides), is_distilled=is_distilled
            )
        )


def inpaint(seed=0):
    if not hasattr(diffusers, "Flux2KleinInpaintPipeline"):
        pytest.skip(f"diffusers {diffusers.__version__} has no Flux2KleinInpaintPipeline")
    return tiny._quiet(diffusers.Flux2KleinInpaintPipeline(**klein(seed).components))


def dev(seed=0, **overrides):
    """A Flux2Pipeline of 2 joint and 2 single blocks, which takes the guidance scale as an input."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # the system's message is left out; a processor would need torchvision, and only passes text on to its tokenizer
        tokenizer = _letters("q{{ messages[-1]['content'][0]['text'] }}")
        text = {**MODEL, "vocab_size": len(tokenizer), "model_type": "mistral"}
        vision = {**MODEL, "model_type": "pixtral", "image_size": 16, "patch_size": 8}
        del vision["num_key_value_heads"]
        text_encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, image_token_index=0))
        return _lively(diffusers.Flux2Pipeline(**_parts(tokenizer, text_encoder), transformer=_transformer(True, overrides)))


def _letters(template):
    tokens = [*string.ascii_letters, "\u0120", "<|endoftext|>"]
    return Qwen2Tokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], chat_template=template)


def _parts(tokenizer, text_encoder):
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
    }


def _transformer(guided, overrides):
    return diffusers.Flux2Transformer2DModel(**{**FLUX2, "guidance_embeds": guided, **overrides})


def _lively(pipe):
    """Queries and keys are normalised here, so that what sharpens attention is the norms' weights."""
    for name, parameter in pipe.transformer.named_parameters():
        if "attn.norm_" in name:
            parameter.data.mul_(3)
    return tiny._lively(pipe)
