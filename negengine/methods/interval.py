"""Settings of guidance in a limited interval of noise levels (Kynkäänniemi et al., arXiv 2404.07724)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from negengine.methods import checks
from negengine.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class GuidanceInterval(Method):
    """Classifier-free guidance only while ``low < sigma <= high``; elsewhere the conditional prediction alone.

    Args:
        low, high: noise levels: sigma is the deviation of the noise over the factor of the signal in the sample
            (``sqrt(1 / abar - 1)``; for flows ``s / (1 - s)``). ``0 <= low < high``; ``math.inf`` as ``high`` leaves the start in.

    Raises:
        TypeError, ValueError: a setting that cannot work, with what would.
    """

    name: ClassVar[str] = "guidance-interval"
    title: ClassVar[str] = "guidance interval"
    owns_prediction: ClassVar[bool] = True

    low: float
    high: float

    def __post_init__(self) -> None:
        self._set("low", checks.not_negative("low", self.low))
        self._set("high", math.inf if self.high == math.inf else checks.number("high", self.high))
        if self.low >= self.high:
            raise ValueError(f"low must be below high (noise levels), got {self.low:g} and {self.high:g}")

    def active(self, sigma: float) -> bool:
        """Whether there is guidance at a noise level."""
        return self.low < sigma <= self.high
