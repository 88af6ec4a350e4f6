"""Numbers as scripts give them: also in a tensor or an array of one element."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor


def number(name: str, value: Any, finite: bool = False) -> Any:
    """A number. Tensors of several elements, and those with a gradient, come back as they are.

    Raises:
        TypeError: no number. ValueError: NaN, or an infinite one though it must be ``finite``.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.requires_grad:
            return value
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if math.isnan(value) or (finite and math.isinf(value)):
        raise ValueError(f"{name} must be a {'finite ' if finite else ''}number, got {value}")
    return value


def one_number(name: str, value: Any, finite: bool = False) -> Any:
    """As :func:`number`, for what must be one. Raises also ValueError: a tensor of several elements."""
    one = number(name, value.detach() if isinstance(value, Tensor) else value, finite)
    if isinstance(one, Tensor):
        raise ValueError(f"{name} must be one number, got a tensor of shape {list(one.shape)}")
    return one


def probability(name: str, value: Any) -> Any:
    """From 0 to 1. Raises as :func:`one_number`, and ValueError for another."""
    one = one_number(name, value)
    if not 0 <= one <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {one}")
    return one
