"""Tiny, random pipelines of Z-Image, beside those of tiny_more.py."""

from __future__ import annotations

import diffusers
import tiny
import tiny_more
import torch
from tiny import PROMPTS, WIDTH, picture
from transformers import Qwen3Config, Qwen3Model

Z_IMAGE = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": WIDTH,
    "axes_dims": [4, 6, 6],
    "axes_lens": [128, 32, 32],
}
SIZE = tiny.SIZE["flux"]  # 5 x 7 tokens, which are filled up to 64
# texts of one token for each letter, filled up to 32: this one takes 64
LONG = "a very long text that no other prompt of these tests is as long as"


def z_image(seed=0, **overrides):
    """A ZImagePipeline of 3 layers and a refiner of one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = tiny_more._letters()
        tokenizer.chat_template = "{% for message in messages %}q{{ message['content'] }}{% endfor %}"
        text = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 2}
        text |= {"num_hidden_layers": 2, "head_dim": 16, "vocab_size": len(tokenizer)}
        transformer = diffusers.ZImageTransformer2DModel(**{**Z_IMAGE, **overrides})
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(token)
        return tiny_more._lively(
            diffusers.ZImagePipeline(
                scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
                vae=tiny._vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
                text_encoder=Qwen3Model(Qwen3Config(**text)),
                tokenizer=tokenizer,
                transformer=transformer,
            )
        )


def z_image_img2img(seed=0):
    return tiny._quiet(diffusers.ZImageImg2ImgPipeline(**z_image(seed).components))


def z_image_controlnet(seed=0):
    pipe = z_image(seed)
    shared = {name: Z_IMAGE[name] for name in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")}
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        control = diffusers.ZImageControlNetModel(control_layers_places=[0, 1], control_in_dim=Z_IMAGE["in_channels"], **shared)
        for block in control.control_layers:
            torch.nn.init.normal_(block.after_proj.weight, std=0.2)
    return tiny._quiet(diffusers.ZImageControlNetPipeline(**pipe.components, controlnet=control))


def z_image_inpaint(seed=0):
    return tiny._quiet(diffusers.ZImageInpaintPipeline(**z_image(seed).components))


OWN = {
    "z_image": z_image,
    "z_image_img2img": z_image_img2img,
    "z_image_inpaint": z_image_inpaint,
    "z_image_controlnet": z_image_controlnet,
}


def draw(pipe, prompts=2, n=2, seed=2, **kwargs):
    """Latents of ``prompts`` prompts x ``n`` images. Further arguments go to the pipeline."""
    name = type(pipe).__name__
    arguments = {**SIZE, "num_inference_steps": 3, "output_type": "latent", "num_images_per_prompt": n, "guidance_scale": 0.0}
    if "Img2Img" in name or "Inpaint" in name:
        arguments.update(image=picture(9, (SIZE["width"], SIZE["height"])), strength=0.7)
    if "ControlNet" in name:
        arguments["control_image"] = picture(9, (SIZE["width"], SIZE["height"]))
    if "Inpaint" in name:
        arguments["mask_image"] = tiny.half_mask((SIZE["width"], SIZE["height"]))
    arguments.update(kwargs)
    # the pipeline writes into the lists that it is given
    texts = {name: [*arguments[name]] for name in ("prompt", "negative_prompt") if isinstance(arguments.get(name), list)}
    arguments = {"prompt": PROMPTS[:prompts], **arguments, **texts}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # pictures are encoded with random numbers of torch's own
        return pipe(generator=torch.Generator().manual_seed(seed), **arguments).images
