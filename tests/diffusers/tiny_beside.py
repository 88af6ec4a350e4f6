"""Further pipelines of diffusers around the tiny denoisers: inpainting, control, adapters, the refiner."""

from __future__ import annotations

import diffusers
import torch
from tiny import SIZE, UNET, WIDTH, _awaken, _parts, _quiet, flux, half_mask, picture, sd, sdxl

FLUX_PARTS = ("image_encoder", "feature_extractor")


def size(family):
    """(width, height) of the images."""
    return SIZE[family]["width"], SIZE[family]["height"]


def inpaint(family, **overrides):
    if family == "flux":
        return _quiet(diffusers.FluxInpaintPipeline(**_parts(flux(**overrides), without=FLUX_PARTS)))
    if family == "sdxl":
        return _quiet(diffusers.StableDiffusionXLInpaintPipeline(**_parts(sdxl(**overrides)), add_watermarker=False))
    parts = _parts(sd(sample_size=64, **overrides))
    return _quiet(diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False))


def canvas(family):
    """What an inpainting pipeline is called with: a picture of which the left half is drawn anew."""
    return {"image": picture(9, size(family)), "mask_image": half_mask(size(family)), "strength": 0.7}


def flux_fill():
    """Its denoiser takes the masked picture and the mask beside the latents."""
    mask = 8 * 8 * 4  # of the pixels of a token
    return _quiet(diffusers.FluxFillPipeline(**_parts(flux(in_channels=2 * 16 + mask, out_channels=16), without=FLUX_PARTS)))


def flux_control():
    return _quiet(diffusers.FluxControlPipeline(**_parts(flux(in_channels=32, out_channels=16), without=FLUX_PARTS)))


def adapter(family="sdxl"):
    """A pipeline with a T2I-Adapter, whose features are added within the UNet's blocks. Sizes divide by 16."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        features = diffusers.T2IAdapter(
            channels=[*UNET["block_out_channels"]], num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl"
        )
        _awaken(features.adapter, "conv_in")
    if family == "sdxl":
        return _quiet(diffusers.StableDiffusionXLAdapterPipeline(**_parts(sdxl()), adapter=features))
    parts = _parts(sd(), without=("image_encoder",))
    return _quiet(diffusers.StableDiffusionAdapterPipeline(**parts, adapter=features, requires_safety_checker=False))


def refiner():
    """Of one text encoder, and told how beautiful the image is to be."""
    unet = {"cross_attention_dim": WIDTH, "projection_class_embeddings_input_dim": WIDTH + 5 * 8}
    parts = _parts(sdxl(seed=4, **unet)) | {"text_encoder": None, "tokenizer": None}
    return _quiet(diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False))


def instruct():
    """InstructPix2Pix, which guides by the text and by the image to be edited."""
    parts = _parts(sdxl(in_channels=8), without=FLUX_PARTS)
    return _quiet(diffusers.StableDiffusionXLInstructPix2PixPipeline(**parts, add_watermarker=False))
