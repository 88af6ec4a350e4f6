"""What a loop of a pipeline needs, computed without running it: memory, operations, and where it would merge."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from negengine.bench import rivals
from negengine.bench.architectures import Architecture, made_on
from negengine.bench.free import free_bytes
from negengine.diffusers.effects.blocks import select
from negengine.diffusers.families import Site, find_denoiser

ROUNDED = 512  # bytes: torch's allocators hand out no less


@dataclass(frozen=True)
class Footprint:
    """Of one forward with so many images.

    Attributes:
        weights: bytes of the denoiser.
        peak: bytes at the most, weights and inputs among them, without a method. Ours adds its workspace to it.
        published: the same, with the published algorithm in every place that merges.
        flops: multiplications and additions of the forward.
        search_flops: those of the search, in all places that merge.
        beside: bytes of the weights of the text encoders and of the VAE, where they take part.
        decoding: bytes that the VAE needs beside all weights, for all images at once.
    """

    weights: int
    peak: int
    published: int
    flops: int
    search_flops: int
    beside: int = 0
    decoding: int = 0

    @property
    def most(self) -> int:
        """Bytes at the most in a loop, decoding among it. What the text encoders make for a prompt is left out: it is little."""
        return self.weights + self.beside + max(self.published - self.weights, self.decoding)


def footprint(
    architecture: Architecture,
    depth: tuple[int, int],
    size: int,
    images: int,
    dtype: torch.dtype,
    encoders: bool = False,
    vae: bool = False,
) -> Footprint:
    """Of a denoiser, and of the text encoders and the VAE if they take part in the loop.

    Nothing is allocated: tensors have shapes alone. Attention is taken to be fused, as it is on a GPU and on a CPU.

    Blocks alike need the same, so that each number grows by the same with every block of a kind. The memory beside the weights does
    not grow: the next block uses it again.
    """
    needs = size, images, dtype
    one, first, second = (_followed(architecture, layers, *needs) for layers in ((1, 1), (2, 1), (1, 2)))

    def grown(number: Callable[[Footprint], int]) -> int:
        steps = number(first) - number(one), number(second) - number(one)
        return number(one) + (depth[0] - 1) * steps[0] + (depth[1] - 1) * steps[1]

    weights = grown(lambda found: found.weights)
    beside, decoding = _beside(architecture, size, images, dtype, encoders, vae)
    return Footprint(
        weights=weights,
        peak=weights + one.peak - one.weights,
        published=weights + one.published - one.weights,
        flops=grown(lambda found: found.flops),
        search_flops=grown(lambda found: found.search_flops),
        beside=beside,
        decoding=decoding,
    )


@functools.cache
def _followed(architecture: Architecture, depth: tuple[int, int], size: int, images: int, dtype: torch.dtype) -> Footprint:
    """One forward, operator by operator."""
    with torch.no_grad(), made_on("meta", dtype):
        model, inputs = architecture.denoiser(depth), architecture.inputs(size, images)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        given = [*model.parameters(), *model.buffers(), *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))]
        searches: list[int] = []
        with _FusedAttention() as attention, _Live(given) as live, _published(model, size, images, live, searches):
            model(**inputs, return_dict=False)
    flops = live.flops + attention.flops
    return Footprint(weights, live.peak, live.peak_within, flops, sum(searches))


def _beside(architecture: Architecture, size: int, images: int, dtype: torch.dtype, encoders: bool, vae: bool) -> tuple[int, int]:
    """Bytes of the weights of those text encoders and VAE that take part, and of what decoding holds beside all weights."""
    decoder, decoding = _decoded(architecture, size, images, dtype) if vae else (0, 0)
    return decoder + (_encoders(architecture, dtype) if encoders else 0), decoding


@functools.cache
def _encoders(architecture: Architecture, dtype: torch.dtype) -> int:
    """Bytes of the text encoders' weights."""
    with made_on("meta", dtype):
        return sum(parameter.nbytes for encoder in architecture.encoders() for parameter in encoder.parameters())


@functools.cache
def _decoded(architecture: Architecture, size: int, images: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the VAE's weights, and of what it holds beside them while it decodes."""
    if architecture.upcasts and dtype is torch.float16:
        dtype = torch.float32
    with torch.no_grad(), made_on("meta", dtype):
        vae: Any = architecture.vae()
        weights = sum(parameter.nbytes for parameter in vae.parameters())
        latents = torch.randn(images, vae.config.latent_channels, size // 8, size // 8)
        with _FusedAttention(), _Live([*vae.parameters(), latents]) as live:
            vae.decode(latents, return_dict=False)
    return weights, live.peak - weights


class _Live(TorchDispatchMode):
    """Bytes of the tensors that operators have made and that are still held, and what the operators compute.

    Attributes:
        peak: the most bytes there were, outside of :meth:`within`. peak_within: there as well.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        """``given``: what is there before."""
        super().__init__()
        self.bytes = self.peak = self.peak_within = self.flops = 0
        self._known: set[int] = set()
        self._within = False
        for tensor in given:
            self._hold(tensor.untyped_storage())

    @contextmanager
    def within(self) -> Iterator[None]:
        """What is not part of the forward itself."""
        self._within = True
        try:
            yield
        finally:
            self._within = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self._within and function._overloadpacket in flop_registry:
            self.flops += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._hold(value.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // ROUNDED) * ROUNDED
        self._known.add(key)
        self.bytes += size
        self.peak_within = max(self.peak_within, self.bytes)
        if not self._within:
            self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


class _FusedAttention(TorchFunctionMode):
    """Attention whose scores are never stored, which tensors without a device would not get."""

    flops = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key = (*args, *(kwargs or {}).values())[:2]
        self.flops += 4 * query.numel() * key.shape[-2]
        return torch.empty_like(query)


@contextmanager
def _published(model: nn.Module, size: int, images: int, live: _Live, searches: list[int]) -> Iterator[None]:
    """The published algorithm runs in the places where the family merges, on groups of all images."""
    _, family = find_denoiser(model)
    settings = family.defaults["negtome"]
    grids = family.tokens.grids(size // 8, size // 8)

    def merge(x: Tensor) -> None:
        tokens = max((count for count in grids if count <= x.shape[1]), default=0)  # text may come before them
        if not tokens or min(grids[tokens]) < settings["min_grid"]:
            return
        with live.within():
            for group in x[:, x.shape[1] - tokens :].split(images):
                rivals.release(group, 0.9, 0.5)
                searches.append(2 * (images - 1) * tokens**2 * x.shape[2])

    def listener(site: Site) -> Callable[..., None]:
        if site.where == "input":
            return lambda module, args: merge(args[0])
        return lambda module, args, output: merge(output[0] if isinstance(output, tuple) else output)

    hooks = []
    for site in select(list(family.tokens.sites(model)), settings["blocks"], family):
        module, heard = model.get_submodule(site.path), listener(site)
        hooks.append(module.register_forward_pre_hook(heard) if site.where == "input" else module.register_forward_hook(heard))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_fits(
    architecture: Architecture,
    depth: tuple[int, int],
    size: int,
    images: int,
    dtype: torch.dtype,
    device: str,
    encoders: bool = False,
    vae: bool = False,
    least: int = 1,
) -> None:
    """Raises ValueError: there is too little memory; names the largest depth, number of images and size that fit.

    Args:
        least: images that are worth to be named.
    """
    free = free_bytes(device)

    def needs(depth: tuple[int, int] = depth, size: int = size, images: int = images) -> int:
        return _most(architecture, depth, size, images, dtype, encoders, vae)

    needed = needs()
    if needed <= free:
        return
    eighths = [(max(1, depth[0] * share // 8), max(1, depth[1] * share // 8)) for share in range(7, 0, -1)]
    fewer = next((f"--depth {one[0]}+{one[1]}" for one in eighths if needs(depth=one) <= free), None)
    found = [fewer] if fewer is not None else []
    if (few := largest_within(least, images, lambda images: needs(images=images), free)) is not None:
        found.append(f"--images {few}")
    stride = architecture.stride
    if (small := largest_within(1, size // stride, lambda side: needs(size=side * stride), free, power=2)) is not None:
        found.append(f"--size {small * stride}")
    taking = [name for name, taken in ((", its text encoders", encoders), (", its VAE", vae)) if taken]
    would = f"what fits: {', or '.join(found)}" if found else "nothing of this model fits; free some memory"
    raise ValueError(
        f"{architecture.name} of depth {depth[0]}+{depth[1]}{''.join(taking)} with {images} images of {size} x {size} "
        f"needs {needed / 1e9:.1f} GB, "
        f"and {free / 1e9:.1f} GB are free on {device}; {would}"
    )


def largest_within(low: int, high: int, needs: Callable[[int], float], limit: float, power: int = 1) -> int | None:
    """The largest number from ``low`` on that needs no more than the limit, where ``high`` needs more; None: there is none.

    Each guess lies where the limit would be if what is needed grew as the number's power, so that few have to be looked at.
    """
    if low >= high or (below := needs(low)) > limit:
        return None
    above = needs(high)
    for turn in itertools.count(1):
        if high - low <= 1:
            break
        share = (limit - below) / (above - below) if turn % 3 else 0.5  # where it grows otherwise, halves end it soon
        guess = int((low**power + share * (high**power - low**power)) ** (1 / power))
        guess = min(max(guess, low + 1), high - 1)
        if (found := needs(guess)) <= limit:
            low, below = guess, found
        else:
            high, above = guess, found
    return low


def _most(
    architecture: Architecture, depth: tuple[int, int], size: int, images: int, dtype: torch.dtype, encoders: bool, vae: bool
) -> int:
    """:attr:`Footprint.most` of what :func:`footprint` would give, with one forward to follow."""
    one, two, other = (_weights(architecture, layers, dtype) for layers in ((1, 1), (2, 1), (1, 2)))
    weights = one + (depth[0] - 1) * (two - one) + (depth[1] - 1) * (other - one)
    shallow = _followed(architecture, (1, 1), size, images, dtype)
    beside, decoding = _beside(architecture, size, images, dtype, encoders, vae)
    return weights + beside + max(shallow.published - shallow.weights, decoding)


@functools.cache
def _weights(architecture: Architecture, depth: tuple[int, int], dtype: torch.dtype) -> int:
    with made_on("meta", dtype):
        return sum(parameter.nbytes for parameter in architecture.denoiser(depth).parameters())
