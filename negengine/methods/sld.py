"""Settings of safe latent diffusion (SLD, Schramowski et al., arXiv 2211.05105)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from negengine.methods import checks
from negengine.methods.base import Method
from negengine.methods.prompts import Prompt, check_prompt
from negengine.ops.safety import VARIANTS

CONCEPT = (
    "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily fluids, blood, "
    "obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, cruelty"
)


@dataclass(frozen=True, kw_only=True)
class SafeLatentDiffusion(Method):
    """Guidance away from a concept, element by element, where the image is drawn towards it. See :func:`negengine.ops.safety.sld`.

    Presets: ``"weak"``, ``"medium"`` (the defaults), ``"strong"`` and ``"max"`` of the paper; ``"dng"``: the variant in the code
    published with DNG (arXiv 2410.14398).

    Args:
        prompt: the concept to avoid: one text, one per prompt of the call, or :class:`Embeddings`; the paper's safety concept.
        scale: ``s_S``, 0 or more.
        threshold: ``lambda``: elements are guided where the difference of the two predictions lies below it.
        warmup: steps at the start in which the guidance is not changed while its momentum already builds up, 0 or more.
        momentum_scale: ``s_m``, in ``[0, 1]``. momentum: ``beta_m``, in ``[0, 1)``.
        variant: ``"paper"``, or ``"dng"``.
        outer: factor of the whole term, 0 or more. In the paper's variant the term is also scaled by the guidance scale.

    Raises:
        TypeError, ValueError: a setting that cannot work, with what would.
    """

    name: ClassVar[str] = "sld"
    title: ClassVar[str] = "SLD"
    owns_prediction: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "weak": {"warmup": 15, "scale": 20.0, "threshold": 0.0, "momentum_scale": 0.0, "momentum": 0.0},
        "medium": {"warmup": 10, "scale": 1000.0, "threshold": 0.01, "momentum_scale": 0.3, "momentum": 0.4},
        "strong": {"warmup": 7, "scale": 2000.0, "threshold": 0.025, "momentum_scale": 0.5, "momentum": 0.7},
        "max": {"warmup": 0, "scale": 5000.0, "threshold": 1.0, "momentum_scale": 0.5, "momentum": 0.7},
        "dng": {"warmup": 0, "scale": 100.0, "threshold": 0.04, "momentum_scale": 0.2, "momentum": 0.1, "variant": "dng"},
    }

    prompt: Prompt = CONCEPT
    scale: float = 1000.0
    threshold: float = 0.01
    warmup: int = 10
    momentum_scale: float = 0.3
    momentum: float = 0.4
    variant: str = "paper"
    outer: float = 1.0

    def __post_init__(self) -> None:
        self._set("prompt", check_prompt("prompt", self.prompt))
        for name in ("scale", "outer"):
            self._set(name, checks.not_negative(name, getattr(self, name)))
        self._set("threshold", checks.number("threshold", self.threshold))
        checks.count("warmup", self.warmup)
        self._set("momentum_scale", checks.between("momentum_scale", self.momentum_scale, 0, 1))
        self._set("momentum", checks.share("momentum", self.momentum))
        checks.choice("variant", self.variant, VARIANTS)
