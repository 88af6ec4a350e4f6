"""Token dropout without a generator.

A generator cannot be captured by a compiled graph, and drawing from the global one would change every image of a run.
Each token's number is a hash of (seed, stream, position) instead: the same on every device and in every mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MIX_1, _MIX_2, _STEP = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB  # splitmix64, as signed


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014); int64 arithmetic wraps."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MIX_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def keep_tokens(rows: int, tokens: int, dropout: float, seed: Tensor, stream: int | Tensor) -> Tensor:
    """Bool ``[rows, tokens]`` on ``seed``'s device, each false with probability ``dropout``.

    Args:
        rows: images. tokens: per image. dropout: in ``[0, 1)``.
        seed: int64, one element; varies by step.
        stream: varies by block; a tensor on ``seed``'s device where compiled code serves several blocks.
    """
    position = torch.arange(rows * tokens, device=seed.device, dtype=torch.int64)
    key = _mix(seed.view(()) * _STEP + stream)
    uniform = ((_mix(key + position * _STEP) >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53
    return (uniform >= dropout).view(rows, tokens)
