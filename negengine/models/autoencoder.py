"""The autoencoder that the models of a world share: RGB pictures <-> latents, such as 32 x 32 <-> 16 x 16 of 4 channels."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from negengine.models.training import Recipe, Task
from negengine.models.world import Pictures, World

KL_WEIGHT = 3e-4
RECIPE = Recipe(steps=650, batch=32, lr=2e-3, ema=0.99)
PEOPLE_RECIPE = Recipe(steps=1500, batch=16, lr=2e-3, ema=0.99)


def build(world: World) -> AutoencoderKL:
    """An untrained autoencoder."""
    return AutoencoderKL(
        sample_size=world.size,
        latent_channels=world.latent_channels,
        block_out_channels=world.widths,
        down_block_types=("DownEncoderBlock2D",) * len(world.widths),
        up_block_types=("UpDecoderBlock2D",) * len(world.widths),
        layers_per_block=1,
        norm_num_groups=8,
        force_upcast=False,
    )


class AutoencoderTask(Task):
    """Reconstruction of varied pictures (squared and absolute error) with a weak pull of the latents to unit noise."""

    def __init__(self, pictures: Pictures) -> None:
        super().__init__()
        self.vae = build(pictures.world)
        self.pictures = pictures
        self.number = len(pictures.everything())

    def loss(self, batch: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(self.number, (batch,), generator=generator)
        pictures = to_rgb(self.pictures.vary(rows, generator))
        posterior = self.vae.encode(pictures).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        decoded = self.vae.decode(latents).sample.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(decoded, pictures) + 0.2 * F.l1_loss(decoded, pictures) + KL_WEIGHT * divergence


def to_rgb(images: Tensor) -> Tensor:
    """Images in [0, 1] as three channels in [-1, 1], equal ones if they are grey."""
    return images.expand(-1, 3, -1, -1) * 2 - 1


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, batch: int = 512) -> Tensor:
    """Latents (posterior means, as the network gives them, unscaled) of images in [0, 1]."""
    return torch.cat([vae.encode(to_rgb(part)).latent_dist.mean for part in images.split(batch)])


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: Tensor, channelwise: bool = False) -> None:
    """Give the latents a mean of zero in each channel and record the factor that gives them unit deviation.

    ``channelwise`` gives each channel unit deviation, again by way of the convolutions.

    SDXL knows no shift, so the mean is moved into the biases of the two 1 x 1 convolutions around the latents.
    """
    latents = encode(vae, images)
    mean = latents.mean((0, 2, 3))
    outer, inner = vae.quant_conv, vae.post_quant_conv
    if outer.bias is None or inner.bias is None:
        raise ValueError("the convolutions around the latents need biases, to take up the mean")
    outer.bias[: len(mean)] -= mean
    inner.bias += inner.weight[:, :, 0, 0] @ mean
    if channelwise:
        scale = 1 / latents.std((0, 2, 3))
        outer.weight[: len(mean)] *= scale.view(-1, 1, 1, 1)
        outer.bias[: len(mean)] *= scale
        outer.bias[len(mean) :] += 2 * scale.log()
        inner.weight /= scale.view(1, -1, 1, 1)
        latents, mean = latents * scale.view(1, -1, 1, 1), mean * scale
    deviation = (latents - mean.view(1, -1, 1, 1)).square().mean().sqrt().item()
    vae.register_to_config(scaling_factor=1 / deviation, shift_factor=0.0)
