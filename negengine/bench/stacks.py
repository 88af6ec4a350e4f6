"""Stacks of real diffusers blocks at the widths of SDXL and FLUX.1, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

import negengine
from negengine.bench.published import published_backend
from negengine.bench.variants import ALPHA
from negengine.diffusers import Conditioning, Family, Latents, Site, Tokens
from negengine.ops import Backend

IMAGES = 4
CONTEXT, CONTEXT_CHANNELS = 77, 2048  # of SDXL's text encoders
FLUX_TEXT = 512


@dataclass(frozen=True)
class Stack:
    """A stack of attention blocks.

    Attributes:
        family: ``"sdxl"`` (4 images and their unconditional halves, self- and cross-attention) or ``"flux"`` (4 images, joint and
            single blocks).
        tokens, channels: of an image. layers: ``BasicTransformerBlock`` (SDXL), or joint blocks and as many pairs of single ones.
    """

    name: str
    family: str
    tokens: int
    channels: int
    layers: int = 1

    @property
    def settings(self) -> negengine.NegToMe:
        """The defaults of the family, active in every call and every attention."""
        threshold = {"sdxl": 0.7, "flux": 0.65}[self.family]
        return negengine.NegToMe(alpha=ALPHA, threshold=threshold, timesteps=(0, 1000), group_size=IMAGES)

    @property
    def published(self) -> Backend:
        """The backend that runs the published algorithm in its place."""
        return published_backend(IMAGES, ALPHA, float(self.settings.threshold or 0))


STACKS = {
    "cpu": (Stack("sdxl-32", "sdxl", 1024, 1280), Stack("sdxl-64", "sdxl", 4096, 640)),
    "cuda": (
        Stack("sdxl-32", "sdxl", 1024, 1280, layers=10),
        Stack("sdxl-64", "sdxl", 4096, 640, layers=2),
        Stack("flux-1024", "flux", 4096, 3072, layers=2),
    ),
}


class TransformerBlocks(nn.Module):
    """``layers`` of SDXL's transformer blocks, one after another: ``[B, tokens, channels]`` to the same."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        heads, size = channels // 64, 64
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, size, cross_attention_dim=CONTEXT_CHANNELS, activation_fn="geglu")
            for _ in range(layers)
        )

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            sample = block(sample, encoder_hidden_states=encoder_hidden_states)
        return sample


def _sites(module: nn.Module) -> Iterator[Site]:
    for name, _ in module.named_modules():
        if name.endswith((".attn1", ".attn2")):
            yield Site(name, name, "output")


# registered only while a stack is measured: users have no such model, and their error messages name none
TRANSFORMER_BLOCKS = Family(
    name="SDXL's transformer blocks",
    component="blocks",
    pipelines=(),
    matches=lambda module: isinstance(module, TransformerBlocks),
    tokens=Tokens(sites=_sites, grids=lambda height, width: {}),
    latents=Latents(size=lambda inputs: None),
    conditioning=Conditioning(sample="sample", batched=("encoder_hidden_states",)),
    defaults={"negtome": {"alpha": 0.9, "threshold": 0.7, "timesteps": (0, 1000), "blocks": ("*",), "min_grid": 1}},
)


def build(stack: Stack, dtype: torch.dtype, device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model with random weights, the same at every call, and one forward of it. The images of its input resemble each other."""
    torch.manual_seed(0)
    with torch.device(device):
        return _sdxl(stack, dtype) if stack.family == "sdxl" else _flux(stack, dtype)


def _sdxl(stack: Stack, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = TransformerBlocks(stack.channels, stack.layers).to(dtype).eval()
    sample = alike(2, IMAGES, stack.tokens, stack.channels).to(dtype)
    text = torch.randn(2 * IMAGES, CONTEXT, CONTEXT_CHANNELS).to(dtype)
    return model, lambda: model(sample=sample, encoder_hidden_states=text)


def _flux(stack: Stack, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], Tensor]]:
    side, heads = int(stack.tokens**0.5), stack.channels // 128
    sizes = {"num_layers": stack.layers, "num_single_layers": 2 * stack.layers, "num_attention_heads": heads}
    model = FluxTransformer2DModel(**sizes, attention_head_dim=128).to(dtype).eval()
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inputs = {
        "hidden_states": alike(1, IMAGES, stack.tokens, 64).to(dtype),
        "encoder_hidden_states": torch.randn(IMAGES, FLUX_TEXT, 4096).to(dtype),
        "pooled_projections": torch.randn(IMAGES, 768).to(dtype),
        "timestep": torch.full((IMAGES,), 0.95, dtype=dtype),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(dtype),
        "txt_ids": torch.zeros(FLUX_TEXT, 3, dtype=dtype),
    }
    return model, lambda: model(**inputs, return_dict=False)[0]


def alike(halves: int, images: int, *size: int) -> Tensor:
    """Groups of inputs, any two of which have cosines of about 0.9."""
    shared = torch.randn(halves, 1, *size)
    return (0.9**0.5 * shared + 0.1**0.5 * torch.randn(halves, images, *size)).flatten(0, 1)
