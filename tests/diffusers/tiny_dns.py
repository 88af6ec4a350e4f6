"""What the tests of negative images share: pipelines, a look inside them, captions."""

from __future__ import annotations

import tiny
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

import negengine
from negengine.methods import DiffusionNegativePrompt

PROMPTS, SEEDS, STEPS, W = ["a cat", "two dogs"], [5, 11], 2, 4.0
CALL = {
    "sd": {"height": 32, "width": 48, "num_inference_steps": STEPS, "guidance_scale": W},
    "sdxl": {"height": 32, "width": 48, "num_inference_steps": STEPS, "guidance_scale": W},
    "flux": {"height": 32, "width": 48, "num_inference_steps": STEPS, "true_cfg_scale": W, "max_sequence_length": 11},
}


def sd(seed=0):
    """A StableDiffusionPipeline of version 1.x, stepped by DDIM."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = tiny._clip_tokenizer()
        without = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
        unet = {name: value for name, value in tiny.UNET.items() if name not in without} | {"cross_attention_dim": tiny.WIDTH}
        return tiny._quiet(  # its text encoder speaks up by itself
            StableDiffusionPipeline(
                vae=tiny._vae(),
                text_encoder=tiny._clip(CLIPTextModel, clip),
                tokenizer=clip,
                unet=UNet2DConditionModel(**unet, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), out_channels=4),
                scheduler=DDIMScheduler(**tiny.BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        )


def zeroed():
    """An SDXL whose unconditional branch is zeros, as the published one's is."""
    pipe = tiny.sdxl()
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    return pipe


def encoded():
    pipe = tiny.sdxl()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    return pipe


BUILDERS = {"sd": sd, "sdxl, zeros": zeroed, "sdxl, empty text": encoded, "flux": tiny.flux}


def kind(pipe):
    return {"FluxPipeline": "flux", "StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}[type(pipe).__name__]


class Watch:
    """What a pipeline decodes, the noise that its runs begin with, and how often it calls its denoiser."""

    def __init__(self, pipe):
        self.decoded, self.first, self.calls = [], [], 0
        decode = pipe.vae.decode
        pipe.vae.decode = lambda z, *args, **kwargs: (self.decoded.append(z.detach().clone()), decode(z, *args, **kwargs))[1]
        tiny.denoiser(pipe).register_forward_pre_hook(self._called)
        prepare = pipe.prepare_latents

        def prepared(*args, **kwargs):
            result = prepare(*args, **kwargs)
            self.first.append((result[0] if isinstance(result, tuple) else result).clone())
            return result

        pipe.prepare_latents = prepared

    def _called(self, module, args):
        self.calls += 1


def words(image):
    """Captions that hang on the picture, so that a wrong picture has a wrong caption."""
    return f"picture {sum(image.tobytes()) % 1000}"


class Counted:
    identity = "counted"

    def __init__(self, answers=words):
        self.answers, self.seen = answers, []

    def __call__(self, image):
        self.seen.append(image)
        return self.answers(image) if callable(self.answers) else self.answers[len(self.seen) - 1]


def prompting(pipe, prompts=PROMPTS, captioner=words, seed=SEEDS, keep_own=True, **arguments):
    settings = DiffusionNegativePrompt(captioner=captioner, keep_own=keep_own)
    return negengine.diffusion_negative_prompting(pipe, prompts, settings, seed=seed, **CALL[kind(pipe)], **arguments)
