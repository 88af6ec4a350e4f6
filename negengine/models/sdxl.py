"""``mnist-sdxl``: a small SDXL U-Net with attention at 16 x 16 and 8 x 8, trained to predict the noise."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from negengine.models import text
from negengine.models.dataset import LatentDigits, keep_mask
from negengine.models.digits import SIZE
from negengine.models.training import Recipe, Task

RECIPE = Recipe(steps=2000, batch=64, lr=1.5e-3)
DROPPED_TO_ZEROS = 0.10
DROPPED_TO_EMPTY = 0.04
TIME_IDS = (SIZE, SIZE, 0, 0, SIZE, SIZE)
"""Original size, crop corner, target size: what the pipeline passes at its default size."""
TIME_ID_WIDTH = 16
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def build() -> UNet2DConditionModel:
    """An untrained U-Net."""
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(3, 6),
        norm_num_groups=16,
        cross_attention_dim=2 * text.WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=text.WIDTH + len(TIME_IDS) * TIME_ID_WIDTH,
    )


class SdxlTask(Task):
    """The U-Net and both text encoders learn the noise; a withheld prompt is all zeros, as the pipeline has it by default."""

    def __init__(self, digits: LatentDigits) -> None:
        super().__init__()
        self.digits = digits
        self.tokenizer = text.clip_tokenizer()
        self.text_encoder = text.clip_encoder(self.tokenizer)
        self.text_encoder_2 = text.clip_projector(self.tokenizer)
        self.unet = build().to(memory_format=torch.channels_last)
        self.noise = DDPMScheduler(**NOISE)

    def loss(self, batch: int, generator: torch.Generator) -> Tensor:
        latents, prompts = self.digits.draw(batch, generator)
        emptied = keep_mask(batch, DROPPED_TO_EMPTY, generator).tolist()
        states, pooled = self.encode([prompt if keep else "" for prompt, keep in zip(prompts, emptied, strict=True)])
        kept = keep_mask(batch, DROPPED_TO_ZEROS, generator).float()
        timesteps = torch.randint(len(self.noise), (batch,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        predicted = self.unet(
            self.noise.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last),
            timesteps,
            encoder_hidden_states=states * kept.view(-1, 1, 1),
            added_cond_kwargs={
                "text_embeds": pooled * kept.view(-1, 1),
                "time_ids": torch.tensor([TIME_IDS], dtype=torch.float32).expand(batch, -1),
            },
        ).sample
        return F.mse_loss(predicted.float(), noise)

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
