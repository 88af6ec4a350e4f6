"""Checks that all metrics share."""

from __future__ import annotations

from torch import Tensor


def check_rows(name: str, x: Tensor, at_least: int = 1) -> None:
    """Raises ValueError unless ``x`` is a finite ``[N, F]`` with ``N >= at_least``."""
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape [N, F], got {list(x.shape)}")
    if len(x) < at_least:
        raise ValueError(f"{name} has {len(x)} rows; at least {at_least} are needed")
    if not x.isfinite().all():
        raise ValueError(f"{name} contains NaN or Inf")
