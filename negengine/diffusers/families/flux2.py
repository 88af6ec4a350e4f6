"""FLUX.2 (dev, klein): joint blocks, then single blocks whose attention and MLP share a projection, over packed latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from negengine.diffusers.families import flux
from negengine.diffusers.families.family import Conditioning, Family, Grid, Latents, Site, Tokens, as_pixels, is_a

if TYPE_CHECKING:
    from PIL import Image


def sites(transformer: Any) -> Iterator[Site]:
    """The places of FLUX.1: before the projection of a joint block, and before the one that a single block's MLP shares.

    In FLUX.1 that shared projection lies behind the attention module, whose output the published code merges. Here it is the
    attention module's own: its input holds the channels of the attention's output, and then those of the MLP.
    """
    config = transformer.config
    for i in range(config.num_layers):
        name = f"transformer_blocks.{i}"
        yield Site(name, f"{name}.attn.to_out.0", "input")
    for i in range(config.num_single_layers):
        name = f"single_transformer_blocks.{i}"
        channels = config.num_attention_heads * config.attention_head_dim
        yield Site(name, f"{name}.attn.to_out", "input", text_first=True, channels=channels)


def prepared(pipe: Any, arguments: Mapping[str, Any], latents: Tensor) -> Grid:
    """Latents that the caller gives are laid out with a pixel for each token."""
    given = arguments["latents"]
    if given is not None:
        return 2 * given.shape[-2], 2 * given.shape[-1]
    return flux.prepared(pipe, arguments, latents)


def pack(latents: Tensor) -> Tensor:
    """``[A, 4 C, h/2, w/2] -> [A, h/2 * w/2, 4 C]``."""
    return latents.flatten(2).transpose(1, 2)


def encode(pipe: Any, pictures: Sequence[Image.Image], size: Grid, device: torch.device) -> Tensor:
    """Pictures as ``[A, 4 C, h/2, w/2]``: the channels of 2 x 2 latents, normalised as the VAE's batch norm has seen them."""
    vae = pipe.vae
    with torch.no_grad():
        clean = vae.encode(as_pixels(pipe, pictures, size).to(device, vae.dtype)).latent_dist.mode().float()
    patches = torch.nn.functional.pixel_unshuffle(clean, 2)
    mean, variance = (seen.to(patches).view(1, -1, 1, 1) for seen in (vae.bn.running_mean, vae.bn.running_var))
    return (patches - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)


def prompts(encoded: Sequence[Any]) -> dict[str, Tensor]:
    return {"encoder_hidden_states": encoded[0]}


def distilled(pipe: Any) -> bool:
    """dev takes the guidance scale as an input, and the distilled klein takes none."""
    return bool(pipe.transformer.config.guidance_embeds or pipe.config.get("is_distilled"))


FLUX2 = Family(
    name="FLUX.2",
    component="transformer",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline"),
    matches=lambda module: is_a(module, "Flux2Transformer2DModel"),
    tokens=Tokens(sites=sites, grids=flux.grids, text=flux.text, followed=True),
    latents=Latents(size=flux.size, prepared=prepared, pack=pack, encode=encode),
    conditioning=Conditioning(
        sample="hidden_states",
        batched=("encoder_hidden_states", "timestep", "guidance", "joint_attention_kwargs"),
        prompts=prompts,
        cfg="calls",
        embeds=("prompt_embeds",),
        distilled=distilled,
    ),
    # no paper gives settings for these models: those of FLUX.1
    defaults=flux.FLUX.defaults,
    unsupported={
        "Flux2KleinKVPipeline": "from its second step on it keeps other images as keys and values alone, which further rows lack",
    },
)
