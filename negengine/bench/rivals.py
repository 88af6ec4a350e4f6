"""What the engine is measured against, on ``x [N, T, D]`` whose image 0 is the reference of all."""

from __future__ import annotations

import torch
from torch import Tensor


def release(x: Tensor, alpha: float, threshold: float, matching: str = "paper") -> Tensor:
    """The algorithm as published: all images normalised, the whole ``N x T x T`` matrix, the reference repeated and gathered."""
    n, t, _ = x.shape
    unit = torch.nn.functional.normalize(x, dim=-1)
    similarity = unit @ unit[:1].transpose(1, 2)
    best, index = similarity.max(dim=-1 if matching == "paper" else -2)
    matched = x[:1].repeat(n, 1, 1)[torch.arange(n, device=x.device)[:, None].expand(n, t), index]
    return torch.where((best > threshold)[..., None], (1 + alpha) * x - alpha * matched, x)


def lean(x: Tensor, alpha: float, threshold: float, matching: str = "paper") -> Tensor:
    """The best plain PyTorch: image 0 skipped, one matrix product, nothing repeated."""
    reference, sources = x[0], x[1:]
    similarity = torch.nn.functional.normalize(sources, dim=-1) @ torch.nn.functional.normalize(reference, dim=-1).T
    best, index = similarity.max(dim=-1 if matching == "paper" else -2)
    pushed = torch.where((best > threshold)[..., None], (1 + alpha) * sources - alpha * reference[index], sources)
    return torch.cat([x[:1], pushed])


def gemm(x: Tensor) -> Tensor:
    """The bare matrix product of the search: its speed of light."""
    return x[1:].flatten(0, 1) @ x[0].T
