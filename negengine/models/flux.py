"""``mnist-flux`` and ``people-flux``: small FLUX transformers over 64 image tokens, trained by flow matching."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from negengine.models import text
from negengine.models.dataset import GeneratorTask, keep_mask
from negengine.models.teaching import STEPS, Readers, teach
from negengine.models.training import Recipe
from negengine.models.world import Latents, World

RECIPE = Recipe(steps=2000, batch=80, lr=1.5e-3)
PEOPLE_RECIPE = Recipe(steps=4500, batch=64, lr=1.2e-3, warmup=200, ema=0.998)
PEOPLE_LATER = Recipe(steps=2000, batch=64, lr=6e-4, warmup=50, ema=0.998)
"""With prompts that name more: what one word asks for against the prevailing look is learned last."""
DROPPED = 0.12
TEXT_LENGTH = 16
"""T5 tokens of a digit's prompt."""
LONG_TEXT_SHARE = 0.06
LONG_TEXT_LENGTHS = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Shape:
    """Numbers of joint blocks, single blocks and heads; a head has 32 channels."""

    joint: int
    single: int
    heads: int


DIGITS = Shape(joint=2, single=4, heads=4)
PEOPLE = Shape(joint=2, single=5, heads=6)


def build(world: World, shape: Shape) -> FluxTransformer2DModel:
    """An untrained transformer."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * world.latent_channels,
        num_layers=shape.joint,
        num_single_layers=shape.single,
        attention_head_dim=32,
        num_attention_heads=shape.heads,
        joint_attention_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


class FluxTask(GeneratorTask):
    """The transformer and its text encoders learn the velocity from data to noise."""

    def __init__(self, data: Latents, shape: Shape = DIGITS) -> None:
        super().__init__(data)
        self.tokenizer = text.clip_tokenizer(data.world.vocabulary, data.world.merged_from_end)
        self.tokenizer_2 = text.t5_tokenizer(data.world.vocabulary)
        self.text_encoder = text.clip_encoder(self.tokenizer)
        self.text_encoder_2 = text.t5_encoder(self.tokenizer_2)
        self.transformer = build(data.world, shape)
        self.readers = Readers(data, text.WIDTH, text.WIDTH) if data.world.naming else None

    def prepare(self, seed: int, steps: int = STEPS) -> None:
        """A head start for the text encoders."""
        encoders = [*self.text_encoder.parameters(), *self.text_encoder_2.parameters()]
        teach(lambda prompts: self.encode(prompts, self.data.world.text_length), encoders, self.data, seed, steps)

    def loss(self, batch: int, generator: torch.Generator) -> Tensor:
        length, batch = _text_length(batch, self.data.world.text_length, generator)
        latents, prompts = self.data.draw(batch, generator)
        kept = keep_mask(batch, DROPPED, generator).tolist()
        sigma = _noise_levels(batch, generator).view(-1, 1, 1, 1)
        noise = torch.randn(latents.shape, generator=generator)
        prompts = [prompt if keep else "" for prompt, keep in zip(prompts, kept, strict=True)]
        states, pooled = self.encode(prompts, length)
        velocity = self.transformer(
            hidden_states=_pack((1 - sigma) * latents + sigma * noise),
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=sigma.flatten(),
            img_ids=_image_ids(latents),
            txt_ids=torch.zeros(length, 3),
        ).sample
        loss = F.mse_loss(velocity.float(), _pack(noise - latents))
        if self.readers is None:
            return loss
        return loss + self.data.world.naming * self.readers.loss(states, pooled, prompts)[0]

    def encode(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """States ``[B, length, D]`` of T5 and the pooled state ``[B, D]`` of CLIP, unmasked as the pipeline has them."""
        clip = self.tokenizer(
            prompts, padding="max_length", max_length=text.CLIP_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        t5 = self.tokenizer_2(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        return self.text_encoder_2(t5).last_hidden_state, self.text_encoder(clip).pooler_output

    def pipeline(self, vae: AutoencoderKL) -> FluxPipeline:
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            transformer=self.transformer,
        )


def _text_length(batch: int, usual: int, generator: torch.Generator) -> tuple[int, int]:
    """Mostly the ``usual`` length; now and then a longer one, with fewer images so that a step costs about the same."""
    if torch.rand((), generator=generator) >= LONG_TEXT_SHARE:
        return usual, batch
    length = LONG_TEXT_LENGTHS[int(torch.randint(len(LONG_TEXT_LENGTHS), (), generator=generator))]
    return length, max(1, batch * (64 + usual) // (64 + length))


def _noise_levels(batch: int, generator: torch.Generator) -> Tensor:
    """Sigmas in (0, 1): half logit-normal, half uniform, so that both ends are seen."""
    normal = torch.randn(batch, generator=generator).sigmoid()
    uniform = torch.rand(batch, generator=generator)
    return torch.where(torch.rand(batch, generator=generator) < 0.5, normal, uniform)


def _pack(latents: Tensor) -> Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)


def _image_ids(latents: Tensor) -> Tensor:
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    return FluxPipeline._prepare_latent_image_ids(1, height, width, latents.device, latents.dtype)
