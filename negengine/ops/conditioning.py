"""Changes of the prompt embedding in plain torch: condition annealing (CADS) and seed variance.

Both take the random numbers as tensors, so that the caller says by which generator, on which device, they are drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cads_gamma(t: float, tau1: float, tau2: float) -> float:
    """How clean the embedding is at time ``t``: 1 up to ``tau1``, 0 from ``tau2``, linear between (CADS, arXiv 2310.17347).

    Args:
        t: time in ``[0, 1]``; sampling runs from 1 to 0.
        tau1, tau2: ``0 <= tau1 < tau2 <= 1``.
    """
    return min(max((tau2 - t) / (tau2 - tau1), 0.0), 1.0)


def cads(c: Tensor, gamma: float | Tensor, scale: float, psi: float, noise: Tensor, used: Tensor | None = None) -> Tensor:
    """The annealed embedding (CADS, Sadat et al., arXiv 2310.17347).

    ``y = sqrt(gamma) c + scale sqrt(1 - gamma) noise``; ``z`` is ``y`` with the mean and the deviation of ``c``; the result is
    ``psi z + (1 - psi) y``. Mean and deviation (of the sample, n - 1) are those of one row, over all its tokens and channels.

    Args:
        c: embedding ``[B, L, D]`` (tokens) or ``[B, D]`` (pooled), any floating dtype.
        gamma: see :func:`cads_gamma`; with 1 the result is ``c`` itself, to the bit. A tensor without dimensions lets compiled
            code serve every value.
        scale: deviation of the noise. psi: share that is rescaled, in ``[0, 1]``.
        noise: standard normal, of ``c``'s shape.
        used: bool ``[B, L, 1]``, False at tokens that a text was filled up with: they stay as they are, and do not count.

    Returns:
        A tensor like ``c``; computed in float32 for dtypes that are narrower. A row whose ``y`` has no deviation stays ``y``.

    Raises:
        ValueError: another shape.
    """
    _check("noise", noise, c)
    if not isinstance(gamma, Tensor) and gamma == 1:
        return c
    clean = c.to(torch.promote_types(c.dtype, torch.float32))
    y = gamma**0.5 * clean + scale * (1 - gamma) ** 0.5 * noise.to(clean.dtype)
    mean, spread = _moments(y, used)
    mean_before, spread_before = _moments(clean, used)
    z = (y - mean) / spread * spread_before + mean_before
    found = torch.where(spread > 0, psi * z + (1 - psi) * y, y)
    return (found if used is None else torch.where(used, found, clean)).to(c.dtype)


def _moments(x: Tensor, used: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n - 1) of each row, over its ``used`` tokens."""
    dims = tuple(range(1, x.ndim))
    if used is None:
        return x.mean(dims, keepdim=True), x.std(dims, keepdim=True)
    used = used.expand_as(x)
    kept = torch.where(used, x, 0)
    mean = kept.sum(dims, keepdim=True) / used.sum(dims, keepdim=True)
    return mean, _deviation(kept, used)


def seed_variance(c: Tensor, share: float, strength: float, noise: Tensor, choice: Tensor, relative: bool = False) -> Tensor:
    """Adds uniform noise in ``[-strength, strength]`` to a share of the embedding's values.

    ``c + strength * (2 noise - 1)`` where ``choice < share``. Tokens that are zero throughout (padding) stay zero.

    Args:
        c: embedding ``[B, L, D]`` (tokens) or ``[B, D]`` (pooled), any floating dtype.
        share: in ``[0, 1]``. strength: half the width of the noise.
        noise, choice: uniform in ``[0, 1)``, of ``c``'s shape.
        relative: ``strength`` is in standard deviations (n - 1) of the row, over all values of its tokens that are not zero
            throughout; otherwise in units of the values.

    Returns:
        A new tensor like ``c``; computed in float32 for dtypes that are narrower.

    Raises:
        ValueError: another shape.
    """
    _check("noise", noise, c)
    _check("choice", choice, c)
    clean = c.to(torch.promote_types(c.dtype, torch.float32))
    used = (clean != 0).any(-1, keepdim=True).expand_as(clean)
    added = strength * (2 * noise.to(clean.dtype) - 1)
    if relative:
        added = added * _deviation(clean, used)
    return torch.where(used & (choice < share), clean + added, clean).to(c.dtype)


def _deviation(c: Tensor, used: Tensor) -> Tensor:
    """Standard deviation (n - 1) of each row's ``used`` values; zero where there are fewer than two."""
    dims = tuple(range(1, c.ndim))
    n = used.sum(dims, keepdim=True)
    mean = c.sum(dims, keepdim=True) / n.clamp_min(1)  # what is not used is zero
    squares = ((c - mean).square() * used).sum(dims, keepdim=True)
    return (squares / (n - 1).clamp_min(1)).sqrt()


def _check(name: str, x: Tensor, c: Tensor) -> None:
    if c.ndim not in (2, 3):
        raise ValueError(f"the embedding must have the shape [B, L, D] or [B, D], got {list(c.shape)}")
    if x.shape != c.shape:
        raise ValueError(f"{name} has the shape {list(x.shape)}, the embedding {list(c.shape)}; make them equal")
