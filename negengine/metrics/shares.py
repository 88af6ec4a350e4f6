"""What labels tell: how many kinds there are, how evenly, and how one distribution differs from another."""

from __future__ import annotations

import torch
from torch import Tensor


def label_shares(labels: Tensor, classes: int, without: int | None = None) -> Tensor:
    """Share of each class among labels, float64 ``[classes]``.

    Args:
        labels: int64 ``[N]`` in ``[0, classes)``.
        without: a class that is left out; the shares are those of the other classes, and its own is 0.

    Raises:
        ValueError: another shape or dtype, a label that is no class, or no label left.
    """
    _check(labels, classes)
    counts = torch.bincount(labels.cpu(), minlength=classes).double()
    if without is not None:
        counts[without] = 0
    if not counts.sum():
        raise ValueError("no label is left of which there could be shares")
    return counts / counts.sum()


def label_entropy(labels: Tensor) -> Tensor:
    """Entropy of labels in bits, a float64 scalar. Raises ValueError for another shape or dtype, or no label."""
    _check(labels, None)
    shares = torch.unique(labels, return_counts=True)[1].double() / len(labels)
    return torch.special.entr(shares).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64))


def distinct_labels(labels: Tensor) -> Tensor:
    """How many different labels there are, a float64 scalar. Raises ValueError for another shape or dtype, or no label."""
    _check(labels, None)
    return torch.tensor(float(len(torch.unique(labels))), dtype=torch.float64)


def label_divergence(labels: Tensor, base: Tensor, classes: int, without: int | None = None, prior: float = 0.5) -> Tensor:
    """Kullback-Leibler divergence of labels from base labels, in bits, both without one class.

    Args:
        labels, base: int64 ``[N]`` and ``[M]``.
        without: the class that is left out on both sides.
        prior: added to every class's count on both sides (Jeffreys' 1/2), so that a class that was not drawn has a finite weight.

    Returns:
        float64 scalar, 0 for equal shares.

    Raises:
        ValueError: as :func:`label_shares`; ``prior`` is not above 0, or ``without`` leaves no class.
    """
    if not prior > 0:
        raise ValueError(f"prior must be above 0, got {prior}")
    kept = [number for number in range(classes) if number != without]
    if not kept:
        raise ValueError("no class is left to compare")
    p, q = (_smoothed(found, classes, kept, prior) for found in (labels, base))
    return (p * (p / q).log2()).sum()


def _smoothed(labels: Tensor, classes: int, kept: list[int], prior: float) -> Tensor:
    _check(labels, classes)
    counts = torch.bincount(labels.cpu(), minlength=classes).double()[kept] + prior
    return counts / counts.sum()


def _check(labels: Tensor, classes: int | None) -> None:
    if labels.ndim != 1 or labels.dtype != torch.int64 or not len(labels):
        raise ValueError(f"labels must be int64 of shape [N] with N >= 1, got {labels.dtype} {list(labels.shape)}")
    if int(labels.min()) < 0 or (classes is not None and int(labels.max()) >= classes):
        raise ValueError(f"labels must lie in 0 … {'' if classes is None else classes - 1}")
