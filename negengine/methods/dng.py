"""Settings of dynamic negative guidance (DNG, Koulischer et al., arXiv 2410.14398)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from negengine.methods import checks
from negengine.methods.base import Method
from negengine.methods.negative_prompting import check_shared
from negengine.methods.prompts import Prompt

VARIANCES = ("posterior", "release")
SURROGATES = (None, "ancestral")

_CIFAR = {"scale": 5.0, "prior": 0.01, "tau": 0.2, "delta": 2e-4, "p_max": 0.8}


def _stable_diffusion(tau: float, delta: float, scale: float) -> dict[str, object]:
    return {"scale": scale, "prior": 0.01, "tau": tau, "delta": delta, "p_max": 0.99}


@dataclass(frozen=True, kw_only=True)
class DynamicNegativeGuidance(Method):
    """Negative guidance whose strength follows a running estimate of how far the image belongs to what is to be avoided.

    With ``e`` the base prediction, ``e_neg`` that for ``prompt`` and ``p`` the estimate, one value per image: the prediction is
    ``e - scale * p / (1 - p) * (e_neg - e)``, and after each step ``p`` is multiplied by the ratio of the step's two transition
    densities, ``exp((-tau * (|x_prev - mu_neg|^2 - |x_prev - mu_base|^2) + delta) / (2 sigma^2))``, and clamped.

    Presets: ``"paper"`` and ``"release"`` are the authors' CIFAR-10 example as printed and as their code runs it (it never
    passes delta on); ``"feast"``, ``"dinner"``, ``"workshop"``, ``"antique"``, ``"breakfast"`` their prompts for Stable Diffusion.

    Args:
        prompt: what is to be avoided: one text, one per prompt of the call, or :class:`Embeddings`.
        scale: guidance scale, 0 or more.
        prior: estimate before the first step, in ``(0, 1)``; clamped like every later one.
        tau: temperature: weight of the distances, 0 or more; with 0 and ``delta`` 0 the estimate stays at ``prior``.
        delta: added to the weighted distances, in their unit (squared noise, summed over the elements of an image).
        p_min, p_max: the estimate's bounds, ``0 < p_min < p_max < 1``.
        variance: ``"posterior"``, or ``"release"`` to divide as the published code does, also in the last step.
        surrogate: ``"ancestral"`` takes the transition density of the ancestral step for samplers that have none (DDIM, Euler,
            DPM++, flow); None refuses them.
        negative: ``"raw"``: ``e_neg`` is the denoiser's prediction; ``"cfg"``: guided like the base.
        cfg: scale of the base's classifier-free guidance where the pipeline has none in its batch (FLUX), 0 or more; None: none.
        cfg_prompt: the unconditional prompt of ``cfg``.

    Raises:
        TypeError, ValueError: a setting that cannot work, with what would.
    """

    name: ClassVar[str] = "dng"
    title: ClassVar[str] = "DNG"
    owns_prediction: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": _CIFAR,
        "release": _CIFAR | {"delta": 0.0, "variance": "release"},
        "feast": _stable_diffusion(0.2, 0.004, 27.0),
        "dinner": _stable_diffusion(0.3, 0.003, 12.0),
        "workshop": _stable_diffusion(0.2, 0.002, 27.0),
        "antique": _stable_diffusion(0.2, 0.004, 21.0),
        "breakfast": _stable_diffusion(0.3, 0.003, 18.0),
    }

    prompt: Prompt
    scale: float = 5.0
    prior: float = 0.2
    tau: float = 1.0
    delta: float = 0.0
    p_min: float = 1e-6
    p_max: float = 0.99
    variance: str = "posterior"
    surrogate: str | None = None
    negative: str = "raw"
    cfg: float | None = None
    cfg_prompt: Prompt = ""

    def __post_init__(self) -> None:
        check_shared(self)
        self._set("tau", checks.not_negative("tau", self.tau))
        for name in ("prior", "p_min", "p_max"):
            self._set(name, checks.between(name, getattr(self, name), 0, 1, "()"))
        if self.p_min >= self.p_max:
            raise ValueError(f"p_min must be below p_max, got {self.p_min:g} and {self.p_max:g}")
        self._set("delta", checks.number("delta", self.delta))
        checks.choice("variance", self.variance, VARIANCES)
        checks.choice("surrogate", self.surrogate, SURROGATES)
