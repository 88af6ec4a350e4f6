"""How much the images of a group differ."""

from __future__ import annotations

import torch
from torch import Tensor

from negengine.metrics.checks import check_rows


def cosine_kernel(features: Tensor) -> Tensor:
    """Cosines between all rows, float64 ``[N, N]``; the diagonal is 1 exactly."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    return (unit @ unit.T).fill_diagonal_(1)


def pairwise_distance(features: Tensor) -> Tensor:
    """Mean cosine distance over all pairs of a group.

    Args:
        features: ``[N, F]``, ``N >= 2``.

    Returns:
        float64 scalar in ``[0, 2]``: 0 for identical directions, 1 for orthogonal ones.

    Raises:
        ValueError: another shape, fewer than two rows, NaN or Inf.
    """
    check_rows("features", features, at_least=2)
    n = len(features)
    off_diagonal = ~torch.eye(n, dtype=torch.bool, device=features.device)
    return (1 - cosine_kernel(features))[off_diagonal].mean()


def vendi_score(features: Tensor) -> Tensor:
    """Vendi score with the cosine kernel (Friedman and Dieng, arXiv 2210.02410, definition 3.1).

    The exponential of the entropy of the eigenvalues of ``K / N``: the effective number of different images, 1 for ``N``
    copies of one image, ``N`` for orthogonal features.

    Args:
        features: ``[N, F]``.

    Returns:
        float64 scalar in ``[1, N]``.

    Raises:
        ValueError: another shape, no row, NaN or Inf.
    """
    check_rows("features", features)
    weights = torch.linalg.eigvalsh(cosine_kernel(features) / len(features)).clamp_min(0)
    return torch.special.entr(weights).sum().exp()
