"""The calls of guidance, as every backend is given them: checked, rows of adjacent elements."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Branches(NamedTuple):
    """Predictions of ``n`` images of ``size`` elements, of one dtype: base ``e`` and avoided ``m``.

    Attributes:
        conditional, negative: ``[n, size]``, elements adjacent, rows any distance apart.
        unconditional: the same, or None: ``e`` is ``conditional`` and ``m`` is ``negative``.
        guidance: float32 or float64 ``[1]``; with ``unconditional``, ``e = unconditional + guidance
            (conditional - unconditional)``.
        guide_negative: ``m`` is made of ``negative`` as ``e`` is of ``conditional``.
    """

    conditional: Tensor
    negative: Tensor
    unconditional: Tensor | None
    guidance: Tensor | None
    guide_negative: bool


class Guide(NamedTuple):
    """``out = e + strength (e - m)``, ``copies`` times one after another.

    Attributes:
        strength: float32 or float64 ``[n]``, adjacent.
        out: ``[copies * n, size]``, contiguous, to be written.
    """

    branches: Branches
    strength: Tensor
    copies: int
    out: Tensor


class Evidence(NamedTuple):
    """Sums over each image of what ``negengine.reference.guidance.squares`` gives each element.

    Attributes:
        sample, previous: ``[n, size]``, of any float dtypes, elements adjacent.
        means: float64 ``[4]``.
    """

    branches: Branches
    sample: Tensor
    previous: Tensor
    means: Tensor
    clip: float | None


class Nag(NamedTuple):
    """Normalized attention guidance.

    Attributes:
        positive, negative: ``[B, T, D]``, channels adjacent.
        out: what ``positive`` becomes; may be ``positive``. other: ``negative`` where that becomes the same, else None.
    """

    positive: Tensor
    negative: Tensor
    scale: float
    tau: float
    alpha: float
    out: Tensor
    other: Tensor | None
