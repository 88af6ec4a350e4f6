"""The pipelines of :mod:`negengine.compat`, tiny, and what the published ones would give in their place."""

import functools

import torch
from literal_release import Release
from tiny import BUILDERS, CLIP_LENGTH

from negengine import compat

SIZE = {"flux": (80, 80), "sdxl": (72, 72)}  # height and width; 5 x 5 tokens, and 9 x 9 latents over 5 x 5
PUBLISHED = {"flux": compat.FluxNegToMePipeline, "sdxl": compat.StableDiffusionXLNegToMePipeline}
# enough to be seen in the tiny models; one token may be merged and the next not
ARGUMENTS = {"merging_alpha": 0.8, "merging_threshold": 0.8, "merging_t_end": 400}


def published(family, dtype=torch.float32):
    """The tiny pipeline as an object of the release's class."""
    parts = BUILDERS[family]().components
    parts = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    pipe = PUBLISHED[family](**parts, **({"add_watermarker": False} if family == "sdxl" else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype == torch.float32 else pipe.to(dtype)


shared = functools.cache(published)  # for tests that leave it as it is


def arguments(family, **changes):
    return {**ARGUMENTS, **({"min_attn_dim": 1} if family == "sdxl" else {}), **changes}


def draw(pipe, **call):
    """Latents of three images of one prompt, if nothing else is asked for."""
    flux = hasattr(pipe, "transformer")
    height, width = SIZE["flux" if flux else "sdxl"]
    given = {
        "prompt": "a cat", "height": height, "width": width, "num_inference_steps": 3, "num_images_per_prompt": 3,
        "generator": torch.Generator().manual_seed(3), "output_type": "latent",
        **({"max_sequence_length": CLIP_LENGTH, "guidance_scale": 3.5} if flux else {}), **call,
    }  # fmt: skip
    return pipe(**given).images


def literally(family, dtype=torch.float64, low=400, high=1000, alpha=0.8, threshold=0.8, blocks=("up_blocks",), **settings):
    """A tiny pipeline of diffusers with processors that do what the published ones do."""
    pipe = BUILDERS[family]().to(dtype)
    blocks = None if family == "flux" else blocks
    return Release(pipe, 3, low, high, alpha, threshold, blocks=blocks, **settings)


def same(got, expected, plain):
    """Equal, of float64, up to its rounding; and there was something to tell apart."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert (got - plain).abs().max() > 1e-4
