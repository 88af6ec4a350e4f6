"""Tiny, random pipelines of the families beyond FLUX and Stable Diffusion's UNets, beside those of tiny.py."""

from __future__ import annotations

import string

import diffusers
import pytest
import tiny
import tiny_flux2
import tiny_lumina
import torch
from diffusers.models.controlnets.controlnet_qwenimage import QwenImageControlNetModel
from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetModel
from guards import guarded
from tiny import NEGATIVES, PROMPTS, WIDTH, picture
from transformers import CLIPTextModelWithProjection, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

SD3 = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 2 * WIDTH,
    "caption_projection_dim": 2 * 16,
    "pooled_projection_dim": 2 * WIDTH,
    "out_channels": 4,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
}
QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 4, 8),
}
FAMILIES = ["sd3", "qwen", "chroma", "flux2", "lumina"]
OPTIONAL = ("image_encoder", "feature_extractor")
SIZE = tiny.SIZE | dict.fromkeys(FAMILIES, tiny.SIZE["flux"])  # 5 x 7 tokens
# what the calls have beside the prompts
CALL = {
    "sd3": {"guidance_scale": 3.0, "max_sequence_length": 11},
    "qwen": {"true_cfg_scale": 1.0},
    "chroma": {"guidance_scale": 1.0, "max_sequence_length": 17},
    "flux2": {"guidance_scale": 1.0, **tiny_flux2.TEXT},
    "lumina": tiny_lumina.CALL,
}


def sd3(seed=0, **overrides):
    """A StableDiffusion3Pipeline of 3 blocks, the first with a second attention, as Stable Diffusion 3.5 medium has."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip, t5 = tiny._clip_tokenizer(), tiny._t5_tokenizer()
        return _lively(
            diffusers.StableDiffusion3Pipeline(
                scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
                vae=tiny._vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
                text_encoder=tiny._clip(CLIPTextModelWithProjection, clip),
                tokenizer=clip,
                text_encoder_2=tiny._clip(CLIPTextModelWithProjection, clip),
                tokenizer_2=clip,
                text_encoder_3=tiny._t5(t5, 2 * WIDTH),
                tokenizer_3=t5,
                transformer=diffusers.SD3Transformer2DModel(**{**SD3, "dual_attention_layers": (0,), **overrides}),
            )
        )


def sd3_img2img(seed=0):
    return tiny._quiet(diffusers.StableDiffusion3Img2ImgPipeline(**sd3(seed).components))


def sd3_controlnet(seed=0):
    pipe = sd3(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        control = SD3ControlNetModel(**SD3)
        tiny._awaken(control, "controlnet_blocks", "pos_embed_input")
    return tiny._quiet(diffusers.StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=control))


def qwen(seed=0, **overrides):
    """A QwenImagePipeline of 3 blocks; with a short template, texts have a token more than letters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _letters()
        pipe = _lively(
            diffusers.QwenImagePipeline(
                scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
                vae=_video_vae(),
                text_encoder=_qwen_vl(tokenizer),
                tokenizer=tokenizer,
                transformer=diffusers.QwenImageTransformer2DModel(**{**QWEN, **overrides}),
            )
        )
    return _with_short_template(pipe)


def _with_short_template(pipe):
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "q{}", 0
    return pipe


def _letters():
    tokens = [*string.ascii_letters, "\u0120", "<|endoftext|>"]
    return Qwen2Tokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[])


def _video_vae():
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 1.3, 0.7],
    )


def _qwen_vl(tokenizer):
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [2, 2, 4], "rope_type": "default", "type": "default"},
        "vocab_size": len(tokenizer),
    }
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def qwen_img2img(seed=0):
    pipe = qwen(seed)
    return _with_short_template(tiny._quiet(diffusers.QwenImageImg2ImgPipeline(**pipe.components)))


def qwen_controlnet(seed=0):
    pipe = qwen(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        control = QwenImageControlNetModel(**QWEN)
        tiny._awaken(control, "controlnet_blocks", "controlnet_x_embedder")
    other = diffusers.QwenImageControlNetPipeline(**pipe.components, controlnet=control)
    return _with_short_template(tiny._quiet(other))


def chroma(seed=0, **overrides):
    """A ChromaPipeline of 2 joint and 2 single blocks."""
    without = ("pooled_projection_dim", "guidance_embeds")
    config = {name: value for name, value in tiny.TRANSFORMER.items() if name not in without}
    config |= {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        t5 = tiny._t5_tokenizer()
        return _lively(
            diffusers.ChromaPipeline(
                scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
                vae=tiny._vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
                text_encoder=tiny._t5(t5),
                tokenizer=t5,
                transformer=diffusers.ChromaTransformer2DModel(**{**config, **overrides}),
            )
        )


def chroma_img2img(seed=0):
    return tiny._quiet(diffusers.ChromaImg2ImgPipeline(**tiny._parts(chroma(seed), without=OPTIONAL)))


def _lively(pipe):
    """Queries and keys are normalised here, so that what sharpens attention is the norms' weights."""
    for name, parameter in pipe.transformer.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")):
            parameter.data.mul_(3)
    return tiny._lively(pipe)


BUILDERS = tiny.BUILDERS | {
    "sd3": sd3,
    "sd3_img2img": sd3_img2img,
    "sd3_controlnet": sd3_controlnet,
    "qwen": qwen,
    "qwen_img2img": qwen_img2img,
    "qwen_controlnet": qwen_controlnet,
    "chroma": chroma,
    "chroma_img2img": chroma_img2img,
    "flux2": tiny_flux2.klein,
    "flux2_dev": tiny_flux2.dev,
    "flux2_inpaint": tiny_flux2.inpaint,
    "lumina": lambda seed=0: _lively(tiny_lumina.lumina(seed)),
}


def every(*guards):
    """A test of every family; those that are not among ``guards`` wait for `make test-rest`."""
    return pytest.mark.parametrize("family", guarded(((family,) for family in FAMILIES), lambda family: family in guards))


def draw(pipe, prompts=2, n=2, seed=2, **kwargs):
    """Latents of ``prompts`` prompts x ``n`` images. Further arguments go to the pipeline."""
    kind, name = tiny.kind(pipe), type(pipe).__name__
    size = SIZE[kind]
    arguments = {**size, **CALL[kind], "num_inference_steps": 3, "output_type": "latent", "num_images_per_prompt": n}
    if kind == "sd3":
        arguments["negative_prompt"] = NEGATIVES[:prompts]
    if "Img2Img" in name:
        arguments.update(image=[picture(9, (size["width"], size["height"]))] * prompts, strength=0.7)
    if "Inpaint" in name:
        whole = size["width"], size["height"]
        arguments.update(image=picture(9, whole), mask_image=tiny.half_mask(whole), strength=0.7)
    if "ControlNet" in name:
        arguments["control_image"] = picture(9, (size["width"], size["height"]))
    arguments.update(kwargs)
    arguments.setdefault("prompt", PROMPTS[:prompts])
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # control images are encoded with random numbers of torch's own
        return pipe(generator=torch.Generator().manual_seed(seed), **arguments).images


def against(pipe, texts):
    """Negative prompts as arguments of a pipeline's call; FLUX.2 takes them encoded."""
    if tiny.kind(pipe) == "flux2":
        return {"negative_prompt_embeds": pipe.encode_prompt(texts, **tiny_flux2.TEXT)[0].detach()}
    return {"negative_prompt": texts}


def words(image):
    """A captioner."""
    return f"picture {sum(image.tobytes()) % 1000}"
