"""Settings of condition-annealed sampling (CADS, Sadat et al., arXiv 2310.17347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from negengine.methods import checks
from negengine.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class CADS(Method):
    """Noise in the prompt embedding, fading out while the image forms. See :func:`negengine.ops.conditioning.cads`.

    The defaults are those with which the authors of NegToMe (arXiv 2412.01339) compare.

    Args:
        tau1: time, of 1, from which on (downwards) the embedding is clean. tau2: time down to which it is noise alone;
            ``0 <= tau1 < tau2 <= 1``. Sampling runs from time 1 to 0.
        scale: deviation of the noise, in units of the embedding's values, 0 or more.
        psi: share of the result that is rescaled to the clean embedding's mean and deviation, in ``[0, 1]``.
        seed: of the noise, below 2**32 in size; the numbers are drawn on the device, so another device draws others.
        pooled: anneal pooled embeddings too (SDXL, FLUX).
        unconditional: anneal the unconditional embedding of classifier-free guidance too, as the extension for the A1111 web
            interface does.

    Raises:
        TypeError, ValueError: a setting that cannot work, with what would.
    """

    name: ClassVar[str] = "cads"
    title: ClassVar[str] = "CADS"

    tau1: float = 0.6
    tau2: float = 0.9
    scale: float = 0.25
    psi: float = 1.0
    seed: int = 0
    pooled: bool = True
    unconditional: bool = False

    def __post_init__(self) -> None:
        for name in ("tau1", "tau2", "psi"):
            self._set(name, checks.between(name, getattr(self, name), 0, 1))
        if self.tau1 >= self.tau2:
            raise ValueError(f"tau1 must be below tau2, got {self.tau1:g} and {self.tau2:g}")
        self._set("scale", checks.not_negative("scale", self.scale))
        checks.seed(self.seed)
        checks.flag("pooled", self.pooled)
        checks.flag("unconditional", self.unconditional)
