"""``mnist-sdxl`` and ``people-sdxl``: small SDXL U-Nets with attention at 16 x 16 and 8 x 8, trained to predict the noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from negengine.models import text
from negengine.models.dataset import GeneratorTask, keep_mask
from negengine.models.teaching import STEPS, Readers, teach
from negengine.models.training import Recipe
from negengine.models.world import Latents, World

RECIPE = Recipe(steps=4000, batch=48, lr=1.5e-3)
PEOPLE_RECIPE = Recipe(steps=4000, batch=32, lr=1.2e-3, warmup=200, ema=0.998)
DROPPED_TO_ZEROS = 0.10
DROPPED_TO_EMPTY = 0.04
TIME_IDS = 6
TIME_ID_WIDTH = 16
SNR_LIMIT = 5.0
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@dataclass(frozen=True)
class Shape:
    """Channels at 16 x 16 and at 8 x 8, and the attention heads there."""

    widths: tuple[int, int]
    heads: tuple[int, int]


DIGITS = Shape(widths=(32, 96), heads=(2, 6))
PEOPLE = Shape(widths=(64, 160), heads=(2, 5))


def build(world: World, shape: Shape) -> UNet2DConditionModel:
    """An untrained U-Net."""
    return UNet2DConditionModel(
        sample_size=world.latent_size,
        in_channels=world.latent_channels,
        out_channels=world.latent_channels,
        block_out_channels=shape.widths,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=shape.heads,
        norm_num_groups=16,
        cross_attention_dim=2 * text.WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=text.WIDTH + TIME_IDS * TIME_ID_WIDTH,
    )


class SdxlTask(GeneratorTask):
    """The U-Net and both text encoders learn the noise; a withheld prompt is all zeros, as the pipeline has it by default."""

    def __init__(self, data: Latents, shape: Shape = DIGITS) -> None:
        super().__init__(data)
        self.tokenizer = text.clip_tokenizer(data.world.vocabulary, data.world.merged_from_end)
        self.text_encoder = text.clip_encoder(self.tokenizer)
        self.text_encoder_2 = text.clip_projector(self.tokenizer)
        self.unet = build(data.world, shape)
        self.noise = DDPMScheduler(**NOISE)
        self.readers = Readers(data, 2 * text.WIDTH, text.WIDTH) if data.world.naming else None
        size = data.world.size
        self.time_ids = (size, size, 0, 0, size, size)  # original size, corner, target size: what the pipeline passes by default

    def prepare(self, seed: int, steps: int = STEPS) -> None:
        """A head start for the text encoders: without it 1,200 steps read as prompted in 43 % of 40 samples."""
        encoders = [*self.text_encoder.parameters(), *self.text_encoder_2.parameters()]
        teach(self.encode, encoders, self.data, seed, steps)

    def loss(self, batch: int, generator: torch.Generator) -> Tensor:
        latents, prompts = self.data.draw(batch, generator)
        emptied = keep_mask(batch, DROPPED_TO_EMPTY, generator).tolist()
        prompts = [prompt if keep else "" for prompt, keep in zip(prompts, emptied, strict=True)]
        states, pooled = self.encode(prompts)
        kept = keep_mask(batch, DROPPED_TO_ZEROS, generator).float()
        timesteps = torch.randint(len(self.noise), (batch,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        predicted = self.unet(
            self.noise.add_noise(latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=states * kept.view(-1, 1, 1),
            added_cond_kwargs={
                "text_embeds": pooled * kept.view(-1, 1),
                "time_ids": torch.tensor([self.time_ids], dtype=torch.float32).expand(batch, -1),
            },
        ).sample
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        loss = (error * self._weights(timesteps)).mean()
        if self.readers is None:
            return loss
        return loss + self.data.world.naming * self.readers.loss(states, pooled, prompts)[0]

    def _weights(self, timesteps: Tensor) -> Tensor:
        """``min(SNR, 5) / SNR`` (arXiv 2303.09556): the early steps, which decide the digit, count for more."""
        kept = self.noise.alphas_cumprod[timesteps]
        ratio = kept / (1 - kept)
        return ratio.clamp(max=SNR_LIMIT) / ratio

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """States ``[B, CLIP_LENGTH, 2 D]`` of both encoders' last layer but one, and the projected pooled state ``[B, D]``."""
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=text.CLIP_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        first = self.text_encoder(tokens, output_hidden_states=True)
        second = self.text_encoder_2(tokens, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer,
            unet=self.unet,
            scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing"),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
