"""What the engine is measured against, on ``x [N, T, D]`` whose image 0 is the reference of all."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor


def release(x: Tensor, alpha: float, threshold: float, matching: str = "paper", out: Tensor | None = None) -> Tensor:
    """The algorithm as published: all images normalised, the whole ``N x T x T`` matrix, the reference repeated and gathered.

    ``out`` may be ``x``.
    """
    n, t, _ = x.shape
    unit = torch.nn.functional.normalize(x, dim=-1)
    similarity = unit @ unit[:1].transpose(1, 2)
    best, index = similarity.max(dim=-1 if matching == "paper" else -2)
    matched = x[:1].repeat(n, 1, 1)[torch.arange(n, device=x.device)[:, None].expand(n, t), index]
    pushed = (1 + alpha) * x - alpha * matched
    merged = (best > threshold)[..., None]
    return torch.where(merged, pushed, x) if out is None else torch.where(merged, pushed, x, out=out)


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


def flash_kmeans_missing(device: str) -> str | None:
    """None if flash-kmeans can run, else why not."""
    if importlib.util.find_spec("flash_kmeans") is None:
        return "flash-kmeans is not installed"
    return None if device == "cuda" else "flash-kmeans runs on GPUs only"


def flash_kmeans(x: Tensor) -> Callable[[], Tensor]:
    """The assignment kernel of flash-kmeans 0.3.1, bare: norms and output are made before, nothing is merged.

    The nearest centre of unit length, ``|x|^2 + 1 - 2 <x, c>``, is the one of largest cosine. Returns index ``[1, S]`` int32.
    """
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    sources = x[1:].flatten(0, 1)[None]
    centres = torch.nn.functional.normalize(x[:1], dim=-1)
    squares, ones = sources.float().square().sum(-1), torch.ones(centres.shape[:2], device=x.device)
    index = torch.empty(sources.shape[:2], dtype=torch.int32, device=x.device)
    return lambda: euclid_assign_triton(sources, centres, squares, out=index, c_sq=ones)
