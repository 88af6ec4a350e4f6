"""What the plug-in must know of a model family, in three parts: its tokens, its latents, its conditioning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from negengine.methods.base import Method

if TYPE_CHECKING:
    from PIL import Image

Grid = tuple[int, int]
Settings = TypeVar("Settings", bound=Method)


@dataclass(frozen=True)
class Site:
    """A place where an attention output appears.

    Attributes:
        name: of the attention block, as users select it.
        path: of the module to listen to, below the denoiser.
        where: ``"input"`` or ``"output"`` of that module, a tensor ``[B, tokens, D]``; or all its ``"arguments"``.
        text_first: whether text tokens precede the image tokens there.
    """

    name: str
    path: str
    where: str
    text_first: bool = False


def _no_modules(denoiser: nn.Module) -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class Tokens:
    """Where tokens are, and which of them are the image's.

    Attributes:
        sites: every attention block of a denoiser, in order of execution.
        text: number of text tokens that precede the image tokens in a call, from its named inputs.
        grids: number of image tokens -> their grid, for latents of a height and width.
        cross: paths of the modules that attend to the text alone, each with its output projection at ``to_out.0``; none
            where text and image attend to each other in one product.
    """

    sites: Callable[[nn.Module], Iterable[Site]]
    text: Callable[[Mapping[str, Any]], int]
    grids: Callable[[int, int], dict[int, Grid]]
    cross: Callable[[nn.Module], Iterable[str]] = _no_modules


def encode_pictures(pipe: Any, pictures: Sequence[Image.Image], size: Grid, device: torch.device) -> Tensor:
    """Pictures as clean latents ``[A, C, h, w]`` in float32, as the denoiser was trained on them.

    Args:
        size: height and width of the latents.
    """
    vae = pipe.vae
    height, width = size[0] * pipe.vae_scale_factor, size[1] * pipe.vae_scale_factor
    batch = torch.cat([pipe.image_processor.preprocess(picture.convert("RGB"), height, width) for picture in pictures])
    stored = vae.dtype
    if vae.config.get("force_upcast") and stored == torch.float16:
        vae.to(torch.float32)  # SDXL's VAE overflows in float16
    with torch.no_grad():
        encoded = vae.encode(batch.to(device, vae.dtype))
    clean = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents  # AutoencoderTiny
    if vae.dtype != stored:
        vae.to(stored)
    return _normalise(clean.float(), vae.config)


def _normalise(latents: Tensor, config: Any) -> Tensor:
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        view = (1, -1, 1, 1)
        mean, std = latents.new_tensor(mean).view(view), latents.new_tensor(std).view(view)
        return (latents - mean) * config.scaling_factor / std
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def _unpacked_size(pipe: Any, arguments: Mapping[str, Any], latents: Tensor) -> Grid:
    return latents.shape[-2], latents.shape[-1]


def _as_they_are(latents: Tensor) -> Tensor:
    return latents


@dataclass(frozen=True)
class Latents:
    """How latents are laid out.

    Attributes:
        size: height and width of a call's latents, from the denoiser's named inputs; None if they do not tell.
        prepared: the same from the pipeline, the arguments of its ``prepare_latents`` and the latents that it returned.
        pack: latents ``[A, C, h, w]`` -> rows as the denoiser takes them.
        encode: pictures -> clean latents ``[A, C, h, w]``.
    """

    size: Callable[[Mapping[str, Any]], Grid | None]
    prepared: Callable[[Any, Mapping[str, Any], Tensor], Grid] = _unpacked_size
    pack: Callable[[Tensor], Tensor] = _as_they_are
    encode: Callable[[Any, Sequence[Image.Image], Grid, torch.device], Tensor] = encode_pictures


def _takes_two_branches(denoiser: nn.Module) -> bool:
    return False


def _no_prompts(encoded: Sequence[Any]) -> dict[str, Tensor]:
    raise TypeError("this family does not tell how its pipelines encode prompts (Conditioning.prompts)")


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser's rows are told.

    Attributes:
        sample: name of the denoiser's input that holds the latents.
        batched: names of its other inputs with one row per image (tensors, or containers of them).
        prompts: what the pipeline's ``encode_prompt`` returned for one list of prompts -> the denoiser's inputs that it
            becomes, by name; a name with dots leads into a container.
        cfg: ``"halves"`` where classifier-free guidance puts an unconditional half before the conditional one in one
            batch, ``"calls"`` where it calls the denoiser twice.
        scale: name of the argument of a pipeline's call that scales classifier-free guidance.
        embeds: what the pipeline's ``encode_prompt`` returns, in order, as the arguments of its call that take it. Those of
            the unconditional branch begin with ``negative_``; where ``cfg`` is ``"calls"``, it is encoded by a call of its own.
        one_sided: arguments of a pipeline's call, besides prompts and embeddings, that speak to one of the two branches alone.
        distilled: whether a denoiser has the guidance scale as an input, and its pipeline therefore draws no second branch.
    """

    sample: str
    batched: tuple[str, ...]
    prompts: Callable[[Sequence[Any]], dict[str, Tensor]] = _no_prompts
    cfg: Literal["halves", "calls"] = "halves"
    scale: str = "guidance_scale"
    embeds: tuple[str, ...] = ()
    one_sided: tuple[str, ...] = ()
    distilled: Callable[[nn.Module], bool] = _takes_two_branches


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: for messages and logs.
        component: attribute of the pipeline that holds the denoiser.
        pipelines: pipeline classes, for messages.
        matches: whether a module is a denoiser of this family.
        defaults: name of a method -> what its fields take that are None.
        unsupported: pipeline classes with such a denoiser that cannot be served -> why.
    """

    name: str
    component: str
    pipelines: tuple[str, ...]
    matches: Callable[[nn.Module], bool]
    tokens: Tokens
    latents: Latents
    conditioning: Conditioning
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)

    def with_defaults(self, settings: Settings) -> Settings:
        """A method's settings, with what this family sets in the fields that are None."""
        return settings.with_defaults(**self.defaults.get(settings.name, {}))
