"""How much images resemble a given one."""

from __future__ import annotations

import torch
from torch import Tensor

from negengine.metrics.checks import check_rows

NEAREST = 3  # neighbours in a reference


def feature_similarity(features: Tensor, target: Tensor) -> Tensor:
    """Cosine between each image's features and those of the target.

    Args:
        features: ``[N, F]``. target: ``[1, F]``.

    Returns:
        float64 ``[N]`` in ``[-1, 1]``.

    Raises:
        ValueError: shapes that do not fit, NaN or Inf.
    """
    check_rows("features", features)
    check_rows("target", target)
    if target.shape != (1, features.shape[1]):
        raise ValueError(f"target must have shape [1, {features.shape[1]}], got {list(target.shape)}")
    return torch.nn.functional.cosine_similarity(features.double(), target.double())


def pixel_correlation(images: Tensor, target: Tensor) -> Tensor:
    """Pearson correlation between the pixels of each image and of the target.

    Args:
        images: ``[N, C, H, W]``. target: ``[1, C, H, W]``.

    Returns:
        float64 ``[N]`` in ``[-1, 1]``; 0 where an image is of one colour.

    Raises:
        ValueError: shapes that do not fit, NaN or Inf.
    """
    if images.ndim != 4 or target.shape != (1, *images.shape[1:]):
        raise ValueError(f"images [N, C, H, W] and target [1, C, H, W] expected, got {list(images.shape)} and {list(target.shape)}")
    x, y = images.double().flatten(1), target.double().flatten(1)
    check_rows("images", x)
    check_rows("target", y)
    return torch.nn.functional.cosine_similarity(x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True))


def nearest_distance(features: Tensor, reference: Tensor, neighbours: int = NEAREST) -> Tensor:
    """Mean Euclidean distance of each image's features to its nearest rows of a reference.

    Args:
        features: ``[N, F]``. reference: ``[M, F]``, ``M >= neighbours``.

    Returns:
        float64 ``[N]``.

    Raises:
        ValueError: shapes that do not fit, NaN or Inf.
    """
    check_rows("features", features)
    check_rows("reference", reference, at_least=neighbours)
    if reference.shape[1] != features.shape[1]:
        raise ValueError(f"features have {features.shape[1]} columns and those of the reference {reference.shape[1]}")
    far = torch.cdist(features.double(), reference.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return far.topk(neighbours, largest=False).values.mean(-1)
