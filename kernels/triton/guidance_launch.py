"""Launches of the guidance kernels, and how large their blocks are."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
from negengine.kernels.guidance import Branches, Evidence, Guide, Nag
from negengine.kernels.triton.guidance import ALL, BASE, UNGUIDED, evidence_kernel, guide_kernel, nag_kernel
from negengine.kernels.triton.launch import EXTENT
from negengine.kernels.triton.prepared import Prepared
from torch import Tensor

KERNELS = {"guide": guide_kernel, "evidence": evidence_kernel, "nag": nag_kernel}
WHOLE_ROW = 4096  # channels, up to which a token stays in registers


@dataclass(frozen=True)
class ElementsConfig:
    """Elements of a program of ``guide_kernel`` and ``evidence_kernel``. Predicted, as nothing of it has been measured.

    1024 elements in 4 warps are one access of 16 bytes for each thread and tensor in 16 bits: small latents (65,536 elements) still
    give 64 programs.
    """

    block: int = 1024
    num_warps: int = 4


@dataclass(frozen=True)
class TokenConfig:
    """A program of ``nag_kernel``: one token, ``block_d`` channels at a time."""

    block_d: int
    num_warps: int


def token_config(D: int) -> TokenConfig:
    """Sixteen channels or fewer for each thread: two streams and their sums in float32 then take well under 128 registers."""
    block_d = min(max(triton.next_power_of_2(D), 128), WHOLE_ROW)
    return TokenConfig(block_d, max(1, min(8, block_d // 512)))


def guide(call: Guide) -> None:
    branches, n = call.branches, len(call.strength)
    config, tiles, vector = _elements(call.out, *_given(branches))
    pointers = (*_pointers(branches), call.strength, _or(branches.guidance, call.strength), call.out)
    sizes = (*_strides(branches, vector), call.out.shape[1] // vector, n, call.copies, tiles)
    constants = {"GUIDED": _guided(branches), "VECTOR": vector, "BLOCK": config.block}
    kernel = _prepared("guide", call.strength.dtype, None if branches.guidance is None else branches.guidance.dtype)
    kernel.launch(tiles * n, branches.conditional, pointers, sizes, constants, num_warps=config.num_warps)


def evidence(call: Evidence) -> Tensor:
    branches, (n, size) = call.branches, call.sample.shape
    config, tiles, vector = _elements(call.sample, call.previous, *_given(branches))
    partial = call.sample.new_empty(3, n, tiles, dtype=torch.float32)
    pointers = (call.sample, call.previous, *_pointers(branches), call.means, _or(branches.guidance, call.means), partial)
    rows = (call.sample.stride(0) // vector, call.previous.stride(0) // vector, *_strides(branches, vector))
    sizes = (*rows, size // vector, n, tiles, 0.0 if call.clip is None else float(call.clip))
    constants = {"GUIDED": _guided(branches), "CLIPPED": call.clip is not None, "VECTOR": vector, "BLOCK": config.block}
    dtypes = (call.sample.dtype, call.previous.dtype, None if branches.guidance is None else branches.guidance.dtype)
    kernel = _prepared("evidence", *dtypes)
    kernel.launch(tiles * n, branches.conditional, pointers, sizes, constants, num_warps=config.num_warps)
    return partial.sum(-1, dtype=torch.float64)


def nag(call: Nag) -> None:
    z, away, out = call.positive, call.negative, call.out
    other = out if call.other is None else call.other
    (B, T, D), tensors = z.shape, (z, away, out, other)
    config, vector = token_config(D), _vector(D, *tensors)
    strides = (stride // vector for t in tensors for stride in t.stride()[:2])
    # in float64, then rounded once, as Python would have it
    numbers = (float(number) for number in (call.scale - 1, call.tau, call.alpha, 1 - call.alpha))
    sizes = (*strides, T, D // vector, *numbers)
    constants = {
        "BOTH": call.other is not None, "WHOLE": config.block_d >= D, "VECTOR": vector, "BLOCK_D": config.block_d,
    }  # fmt: skip
    _prepared("nag").launch(B * T, z, tensors, sizes, constants, num_warps=config.num_warps)


@functools.cache
def _prepared(name: str, *dtypes: torch.dtype | None) -> Prepared:
    """The launches of a kernel whose tensors, but the first, have these dtypes: variants differ in them too."""
    return Prepared(KERNELS[name])


def _given(branches: Branches) -> list[Tensor]:
    return [t for t in branches[:3] if t is not None]


def _guided(branches: Branches) -> int:
    return (UNGUIDED if branches.unconditional is None else ALL if branches.guide_negative else BASE).value


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Some pointer where nothing is read."""
    return other if tensor is None else tensor


def _pointers(branches: Branches) -> tuple[Tensor, Tensor, Tensor]:
    return branches.conditional, branches.negative, _or(branches.unconditional, branches.conditional)


def _strides(branches: Branches, vector: int) -> tuple[int, ...]:
    return tuple(t.stride(0) // vector for t in _pointers(branches))


def _elements(*rows: Tensor) -> tuple[ElementsConfig, int, int]:
    """Configuration, programs for each image, and elements that divide every row's address, of tensors ``[n, size]``."""
    config, size = ElementsConfig(), rows[0].shape[1]
    return config, triton.cdiv(size, config.block), _vector(size, *rows)


def _vector(size: int, *tensors: Tensor) -> int:
    """How many elements divide rows and their addresses: as many as fill ``EXTENT`` bytes, or one."""
    vector = EXTENT // min(t.itemsize for t in tensors)
    strides = [stride for t in tensors for count, stride in zip(t.shape[:-1], t.stride(), strict=False) if count > 1]
    return vector if math.gcd(vector, size, *strides) == vector else 1
