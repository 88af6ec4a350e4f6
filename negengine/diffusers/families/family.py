"""What the plug-in must know of a model family, in three parts: its tokens, its latents, its conditioning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from negengine.methods import checks
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
        image_first: whether the image tokens come first there, as many as the finest grid has, and others follow them.
        copied: whether others may read the same memory, so that not the tensor itself is changed but a copy takes its place.
        channels: how many channels are the attention's, where those of an MLP follow them (before a projection that both share);
            None: all.
    """

    name: str
    path: str
    where: str
    text_first: bool = False
    image_first: bool = False
    copied: bool = False
    channels: int | None = None

    def __post_init__(self) -> None:
        checks.choice(f"Site(where=...) at {self.path!r}", self.where, ("input", "output", "arguments"))


def _no_modules(denoiser: nn.Module) -> Iterable[str]:
    return ()


def _no_text(inputs: Mapping[str, Any]) -> int:
    return 0


@dataclass(frozen=True)
class Tokens:
    """Where tokens are, and which of them are the image's.

    Attributes:
        sites: every attention block of a denoiser, in order of execution.
        grids: number of image tokens -> their grid, for latents of a height and width.
        text: number of text tokens that precede the image tokens at sites that are ``text_first``, from a call's named inputs;
            or the number in every row, where an image begins right behind its own text and what follows it fills the row up.
        cross: paths of the modules that attend to the text alone, each with its output projection at ``to_out.0``; none
            where text and image attend to each other in one product.
        followed: whether tokens of other images may follow the image's, both in the denoiser's sample and at the sites. They are
            left alone, and the image's are as many as the finest of ``grids`` has.
    """

    sites: Callable[[nn.Module], Iterable[Site]]
    grids: Callable[[int, int], dict[int, Grid]]
    text: Callable[[Mapping[str, Any]], int | list[int]] = _no_text
    cross: Callable[[nn.Module], Iterable[str]] = _no_modules
    followed: bool = False


def encode_pictures(pipe: Any, pictures: Sequence[Image.Image], size: Grid, device: torch.device) -> Tensor:
    """Pictures as clean latents ``[A, C, h, w]`` in float32, as the denoiser was trained on them.

    Args:
        size: height and width of the latents.
    """
    vae, batch = pipe.vae, as_pixels(pipe, pictures, size)
    stored = vae.dtype
    if vae.config.get("force_upcast") and stored == torch.float16:
        vae.to(torch.float32)  # SDXL's VAE overflows in float16
    with torch.no_grad():
        encoded = vae.encode(batch.to(device, vae.dtype))
    clean = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents  # AutoencoderTiny
    if vae.dtype != stored:
        vae.to(stored)
    return normalised(clean.float(), vae.config)


def as_pixels(pipe: Any, pictures: Sequence[Image.Image], size: Grid) -> Tensor:
    """Pictures ``[A, 3, H, W]`` as a pipeline's VAE takes them, for latents of ``size``."""
    height, width = size[0] * pipe.vae_scale_factor, size[1] * pipe.vae_scale_factor
    return torch.cat([pipe.image_processor.preprocess(picture.convert("RGB"), height, width) for picture in pictures])


def normalised(latents: Tensor, config: Any) -> Tensor:
    """What a VAE of this configuration encoded, as its denoiser was trained on it."""
    scale = config.get("scaling_factor", 1.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        view = (1, -1, 1, 1)
        mean, std = latents.new_tensor(mean).view(view), latents.new_tensor(std).view(view)
        return (latents - mean) * scale / std
    return (latents - (config.get("shift_factor") or 0.0)) * scale


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
        negated: whether the pipeline gives its scheduler the denoiser's output with the opposite sign.
    """

    size: Callable[[Mapping[str, Any]], Grid | None]
    prepared: Callable[[Any, Mapping[str, Any], Tensor], Grid] = _unpacked_size
    pack: Callable[[Tensor], Tensor] = _as_they_are
    encode: Callable[[Any, Sequence[Image.Image], Grid, torch.device], Tensor] = encode_pictures
    negated: bool = False


@dataclass(frozen=True)
class Lists:
    """How to speak in tensors to a denoiser whose batches are lists with an entry for each row.

    Attributes:
        texts: name of the input that holds the prompts' embeddings, as ``encode_prompt`` returned them.
        gather: its inputs by name -> the same with tensors in the place of lists, texts filled up and masked (see
            :attr:`Conditioning.mask`; the mask lies on the CPU, so that the way back waits for no device).
        scatter: back again.
        read: what it returned -> its predictions ``[rows, ...]``, with the dimensions that the scheduler takes.
        write: back again.
    """

    texts: str
    gather: Callable[[Mapping[str, Any]], dict[str, Any]]
    scatter: Callable[[Mapping[str, Any]], dict[str, Any]]
    read: Callable[[Sequence[Tensor]], Tensor]
    write: Callable[[Tensor], list[Tensor]]


def _draws_two_branches(pipe: Any) -> bool:
    return False


def _all_text(pipe: Any, length: int) -> int:
    return length


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
        negatives: the same for negative prompts, where ``encode_prompt`` encodes these in another way (without a system prompt)
            and returns both; prompts that a method avoids are encoded in that way then. None where all prompts are alike.
        longest: pipeline, number of text tokens -> the ``max_sequence_length`` with which its ``encode_prompt`` gives as many;
            None where texts of any length stand in one batch, filled up and masked.
        mask: name of the denoiser's input ``[rows, tokens]`` that is 0 where a text is filled up, and may go on over the image
            tokens; a call may leave it None.
        cfg: ``"halves"`` where classifier-free guidance puts an unconditional and a conditional half in one batch, ``"calls"``
            where it calls the denoiser twice.
        conditional_first: whether the conditional half is the first.
        scale: name of the argument of a pipeline's call that scales classifier-free guidance.
        unguided: that scale where the conditional prediction counts alone: 1 in ``u + scale (c - u)``, 0 in ``c + scale (c - u)``.
        renormalises: argument of a pipeline's call, and its attribute after an underscore, that changes the guided prediction by
            its norm; None where there is none.
        truncates: argument of a pipeline's call that ends guidance before the last step if it is below 1; None where there is none.
        embeds: what the pipeline's ``encode_prompt`` returns, in order, as the arguments of its call that take it (None if none
            does). Those of the unconditional branch begin with ``negative_``. Where ``cfg`` is ``"calls"`` they may be
            left out: the pipeline is then asked for them as for a prompt.
        one_sided: arguments of a pipeline's call, besides prompts and embeddings, that speak to one of the two branches alone.
        perturbing: inputs of the denoiser with which a pipeline calls it once more in a step, for guidance of another kind.
        distilled: whether a pipeline draws no second branch at any guidance scale, since its denoiser was distilled from guidance.
        counted: what has a row per image: ``"prompts"``, as ``encode_prompt`` returns them; or ``"latents"``, where each prompt has
            one row that is repeated later, so that only ``prepare_latents`` tells how many images a call draws.
        lists: where the denoiser's batches are lists; ``sample``, ``batched``, ``prompts`` and ``mask`` then name tensors.
    """

    sample: str
    batched: tuple[str, ...]
    prompts: Callable[[Sequence[Any]], dict[str, Tensor]] = _no_prompts
    negatives: Callable[[Sequence[Any]], dict[str, Tensor]] | None = None
    longest: Callable[[Any, int], int] | None = _all_text
    mask: str | None = None
    cfg: Literal["halves", "calls"] = "halves"
    conditional_first: bool = False
    scale: str = "guidance_scale"
    unguided: float = 1.0
    renormalises: str | None = None
    truncates: str | None = None
    embeds: tuple[str | None, ...] = ()
    one_sided: tuple[str, ...] = ()
    perturbing: tuple[str, ...] = ()
    distilled: Callable[[Any], bool] = _draws_two_branches
    counted: Literal["prompts", "latents"] = "prompts"
    lists: Lists | None = None

    def __post_init__(self) -> None:
        checks.choice("Conditioning(cfg=...)", self.cfg, ("halves", "calls"))
        checks.choice("Conditioning(counted=...)", self.counted, ("prompts", "latents"))
        for names in ("batched", "one_sided", "perturbing"):
            value = getattr(self, names)
            if isinstance(value, str) or not all(isinstance(name, str) for name in value):
                raise TypeError(f"Conditioning({names}=...) must be a tuple of names, got {value!r}")

    def negative_part(self, encoded: Sequence[Any]) -> list[Any]:
        """Of what ``encode_prompt`` returned for prompts: what it returned for the negative ones beside them."""
        names = (*self.embeds, *["negative_"] * len(encoded))
        return [part for name, part in zip(names, encoded, strict=False) if name is not None and name.startswith("negative_")]

    def weight(self, scale: float) -> float:
        """``w`` in ``u + w (c - u)`` at a scale of a pipeline's call."""
        return scale + 1 - self.unguided


def is_a(thing: Any, name: str) -> bool:
    """Whether something is of diffusers' class ``name``, or of one derived from it; diffusers need not be imported to ask."""
    return any(kind.__name__ == name and kind.__module__.startswith("diffusers.") for kind in type(thing).__mro__)


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
        unlike: pipeline classes whose calls of the denoiser hold other rows than one for each image, or two with
            classifier-free guidance, or rows to which none with another text can be added -> why. Methods that must tell rows
            apart or add such are refused there.
    """

    name: str
    component: str
    pipelines: tuple[str, ...]
    matches: Callable[[Any], bool]
    tokens: Tokens
    latents: Latents
    conditioning: Conditioning
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)
    unlike: Mapping[str, str] = field(default_factory=dict)

    def with_defaults(self, settings: Settings) -> Settings:
        """A method's settings, with what this family sets in the fields that are None."""
        return settings.with_defaults(**self.defaults.get(settings.name, {}))
