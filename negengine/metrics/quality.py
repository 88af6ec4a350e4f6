"""Whether images show what was asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from negengine.metrics.checks import check_rows


def fidelity(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of images that a classifier reads as the prompted class.

    Args:
        logits: ``[N, classes]``. labels: int64 ``[N]``.

    Returns:
        float64 scalar in ``[0, 1]``.

    Raises:
        ValueError: shapes that do not fit, NaN or Inf, a label that is no class.
    """
    check_rows("logits", logits)
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must have shape [{len(logits)}], got {list(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels must lie in 0 … {logits.shape[1] - 1}")
    return (logits.argmax(-1) == labels).double().mean()


def class_entropy(logits: Tensor) -> Tensor:
    """Entropy, in bits, of the classes that a classifier reads: ``log2(classes)`` if all are drawn alike, 0 if one only.

    Args:
        logits: ``[N, classes]``.

    Returns:
        float64 scalar.

    Raises:
        ValueError: another shape, no row, NaN or Inf.
    """
    check_rows("logits", logits)
    shares = torch.bincount(logits.argmax(-1), minlength=logits.shape[1]).double() / len(logits)
    return torch.special.entr(shares).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64))
