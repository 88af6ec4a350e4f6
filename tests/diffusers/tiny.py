"""Pipelines of the real diffusers classes, tiny and random: text encoders and tokenizers included."""

from __future__ import annotations

import string
from contextlib import contextmanager

import diffusers
import numpy as np
import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH, CLIP_LENGTH = 32, 16
PROMPTS = ["a cat", "two dogs", "the sea"]
NEGATIVES = ["blurred", "dull", "noise"]
# Latents of 9 x 7 (SD and SDXL: odd at both levels of the UNet, 9 x 7 and 5 x 4) and 10 x 14 (FLUX: 5 x 7 tokens), as
# every VAE here scales by 8.
SIZE = {"flux": {"height": 80, "width": 112}, "sdxl": {"height": 72, "width": 56}, "sd": {"height": 72, "width": 56}}


def _clip_tokenizer():
    letters = [*string.ascii_lowercase, *string.digits]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=CLIP_LENGTH)


def _t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in "▁" + string.ascii_letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=512)


def _clip(cls, tokenizer):
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5(tokenizer, width=WIDTH):
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=WIDTH, num_layers=1, num_heads=2, dropout_rate=0.0)
    )


def _vae(**kwargs):
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        **kwargs,
    )


TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "axes_dims_rope": [4, 4, 8],
    "guidance_embeds": True,
}
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "in_channels": 4,
    "norm_num_groups": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
    "cross_attention_dim": 2 * WIDTH,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def flux(seed=0, **overrides):
    """A FluxPipeline of 2 joint and 2 single blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip, t5 = _clip_tokenizer(), _t5_tokenizer()
        return _lively(
            diffusers.FluxPipeline(
                scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
                vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
                text_encoder=_clip(CLIPTextModel, clip),
                tokenizer=clip,
                text_encoder_2=_t5(t5),
                tokenizer_2=t5,
                transformer=diffusers.FluxTransformer2DModel(**{**TRANSFORMER, **overrides}),
            )
        )


def sdxl(seed=0, **overrides):
    """A StableDiffusionXLPipeline with attention at both levels of its UNet."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = _clip_tokenizer()
        unet = {**UNET, "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "out_channels": 4, **overrides}
        return _lively(
            diffusers.StableDiffusionXLPipeline(
                vae=_vae(),
                text_encoder=_clip(CLIPTextModel, clip),
                text_encoder_2=_clip(CLIPTextModelWithProjection, clip),
                tokenizer=clip,
                tokenizer_2=clip,
                unet=diffusers.UNet2DConditionModel(**unet),
                scheduler=diffusers.EulerDiscreteScheduler(**BETAS),
                add_watermarker=False,
            )
        )


def sd(seed=0, **overrides):
    """A StableDiffusionPipeline, of the classes of Stable Diffusion 1.5, with attention at both levels of its UNet."""
    further = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    config = {name: value for name, value in UNET.items() if name not in (*further, "transformer_layers_per_block")}
    config |= {"cross_attention_dim": WIDTH, "use_linear_projection": False, "out_channels": 4}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = _clip_tokenizer()
        unet = {**config, "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), **overrides}
        return _lively(
            diffusers.StableDiffusionPipeline(
                vae=_vae(),
                text_encoder=_clip(CLIPTextModel, clip),
                tokenizer=clip,
                unet=diffusers.UNet2DConditionModel(**unet),
                scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            ),
            text=1,
        )


def flux_img2img(seed=0):
    return _quiet(diffusers.FluxImg2ImgPipeline(**_parts(flux(seed), without=("image_encoder", "feature_extractor"))))


def flux_controlnet(seed=0):
    pipe = flux(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        control = FluxControlNetModel(**TRANSFORMER)
        _awaken(control, "controlnet_blocks", "controlnet_single_blocks", "controlnet_x_embedder")
    return _quiet(
        diffusers.FluxControlNetPipeline(**_parts(pipe, without=("image_encoder", "feature_extractor")), controlnet=control)
    )


def sdxl_img2img(seed=0):
    return _quiet(diffusers.StableDiffusionXLImg2ImgPipeline(**_parts(sdxl(seed)), add_watermarker=False))


def sdxl_controlnet(seed=0):
    pipe = sdxl(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        control = diffusers.ControlNetModel(**UNET, conditioning_embedding_out_channels=(4, 4, 8, 8))
        _awaken(control, "controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding")
    return _quiet(diffusers.StableDiffusionXLControlNetPipeline(**_parts(pipe), controlnet=control, add_watermarker=False))


def _lively(pipe, text=30):
    """Random attention is nearly uniform, so that all tokens come out nearly equal; sharper queries tell them apart.

    ``text`` sharpens cross-attention: SDXL's tiny text encoders speak low.
    """
    for name, parameter in denoiser(pipe).named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight")):
            parameter.data.mul_(4)
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            parameter.data.mul_(text)
        if ".attn" in name and name.endswith("to_out.0.bias"):
            parameter.data.zero_()
    return _quiet(pipe)


def _parts(pipe, without=()):
    return {name: part for name, part in pipe.components.items() if name not in without}


def _awaken(control, *names):
    """The outputs of a new control net are zero; random ones say something."""
    for name in names:
        for parameter in getattr(control, name).parameters():
            torch.nn.init.normal_(parameter, std=0.2)


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


BUILDERS = {
    "flux": flux,
    "flux_img2img": flux_img2img,
    "flux_controlnet": flux_controlnet,
    "sd": sd,
    "sdxl": sdxl,
    "sdxl_img2img": sdxl_img2img,
    "sdxl_controlnet": sdxl_controlnet,
}


def denoiser(pipe):
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def attentions(model):
    """Its attention modules by name; not every model of diffusers lists them itself."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "set_processor")}


TRANSFORMERS = {
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "QwenImageTransformer2DModel": "qwen",
    "ChromaTransformer2DModel": "chroma",
    "Flux2Transformer2DModel": "flux2",
    "Lumina2Transformer2DModel": "lumina",
    "ZImageTransformer2DModel": "z_image",
}


def kind(pipe):
    if hasattr(pipe, "transformer"):
        return TRANSFORMERS[type(getattr(pipe.transformer, "_orig_mod", pipe.transformer)).__name__]
    return "sdxl" if hasattr(pipe, "text_encoder_2") else "sd"


def picture(seed=0, size=(50, 40)):
    """A random RGB image; ``size`` is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def half_mask(size=(50, 40)):
    """White in the left half."""
    pixels = np.zeros((size[1], size[0]), dtype=np.uint8)
    pixels[:, : size[0] // 2] = 255
    return Image.fromarray(pixels)


def draw(pipe, prompts=2, n=2, seed=2, **kwargs):
    """Latents of ``prompts`` prompts x ``n`` images. Further arguments go to the pipeline."""
    arguments = {**SIZE[kind(pipe)], "num_inference_steps": 3, "output_type": "latent", "num_images_per_prompt": n}
    name = type(pipe).__name__
    if kind(pipe) == "flux":
        arguments["max_sequence_length"] = 11
    if "Img2Img" in name:
        arguments.update(image=[picture(9, (112, 80) if kind(pipe) == "flux" else (56, 72))] * prompts, strength=0.7)
        if kind(pipe) != "flux":
            del arguments["height"], arguments["width"]
    if "ControlNet" in name:
        size = SIZE[kind(pipe)]
        control = picture(9, (size["width"], size["height"]))
        arguments["control_image" if kind(pipe) == "flux" else "image"] = control
    if kind(pipe) != "flux":
        arguments["negative_prompt"] = NEGATIVES[:prompts]
    arguments.update(kwargs)
    return pipe(PROMPTS[:prompts], generator=torch.Generator().manual_seed(seed), **arguments).images


def of_1000(model, timestep):
    """A denoiser's timestep, of 1000."""
    t = float(timestep.flatten()[0])
    if type(model).__name__ in ("Lumina2Transformer2DModel", "ZImageTransformer2DModel"):  # from 0, which is noise, to 1
        return round(1000 * (1 - t), 3)
    return t if type(model).__name__ in ("UNet2DConditionModel", "SD3Transformer2DModel") else 1000 * t


@contextmanager
def watched(model):
    """A list that fills with (timestep of 1000, rows) of the calls of a denoiser, as its forward gets them."""
    calls = []

    def note(module, args, kwargs):
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        calls.append((of_1000(module, timestep), len(sample)))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()
