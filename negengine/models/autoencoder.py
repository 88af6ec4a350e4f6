"""The autoencoder that both models share: 32 x 32 RGB pictures <-> 16 x 16 latents of 4 channels."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from negengine.models.digits import SIZE, Digits, Jitter, vary
from negengine.models.training import Recipe, Task

KL_WEIGHT = 3e-4
RECIPE = Recipe(steps=650, batch=32, lr=2e-3, ema=0.99)


def build() -> AutoencoderKL:
    """An untrained autoencoder."""
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        force_upcast=False,
    )


class AutoencoderTask(Task):
    """Reconstruction of varied digits (squared and absolute error) with a weak pull of the latents to unit noise."""

    def __init__(self, digits: Digits) -> None:
        super().__init__()
        self.vae = build()
        self.digits = digits

    def loss(self, batch: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.digits.labels), (batch,), generator=generator)
        pictures = to_rgb(vary(self.digits.images[rows], Jitter(), generator))
        posterior = self.vae.encode(pictures).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        decoded = self.vae.decode(latents).sample.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(decoded, pictures) + 0.2 * F.l1_loss(decoded, pictures) + KL_WEIGHT * divergence


def to_rgb(images: Tensor) -> Tensor:
    """Grey images in [0, 1] as three equal channels in [-1, 1]."""
    return images.expand(-1, 3, -1, -1) * 2 - 1


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, batch: int = 512) -> Tensor:
    """Latents (posterior means, as the network gives them, unscaled) of grey images in [0, 1]."""
    return torch.cat([vae.encode(to_rgb(part)).latent_dist.mean for part in images.split(batch)])


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: Tensor) -> None:
    """Give the latents a mean of zero in each channel and record the factor that gives them unit deviation.

    SDXL knows no shift, so the mean is moved into the biases of the two 1 x 1 convolutions around the latents.
    """
    latents = encode(vae, images)
    mean = latents.mean((0, 2, 3))
    outer, inner = vae.quant_conv, vae.post_quant_conv
    if outer.bias is None or inner.bias is None:
        raise ValueError("the convolutions around the latents need biases, to take up the mean")
    outer.bias[: len(mean)] -= mean
    inner.bias += inner.weight[:, :, 0, 0] @ mean
    deviation = (latents - mean.view(1, -1, 1, 1)).square().mean().sqrt().item()
    vae.register_to_config(scaling_factor=1 / deviation, shift_factor=0.0)
