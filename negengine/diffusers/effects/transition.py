"""The transition density of a sampler's step: how likely it is to get from one sample to the next under a prediction.

Every sampler is seen between two noise levels: ``x_t = a x0 + b n`` and ``x_prev = a' x0 + b' n``. The ancestral step draws from a
normal density whose mean is linear in the sample and in the predicted ``x0``. With ``r = (b' a / (a' b))^2``::

    mean     = a' (1 - r) x0 + (b'^2 a / (a' b^2)) x_t
    variance = b'^2 (1 - r)

which for ``a = sqrt(abar)`` is the posterior of DDPM (Ho et al. 2020, equation 7) and for ``a = 1`` the step of
Euler's ancestral sampler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from negengine.diffusers.clock import Level

EXACT = ("DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
# the next sample is drawn anew around the predicted image, however far that lies from the present one
REDRAWN = ("LCMScheduler", "TCDScheduler")
OTHERS = "switch to DDPMScheduler or EulerAncestralDiscreteScheduler"
ADVICE = (
    "switch to one that has (DDPMScheduler, EulerAncestralDiscreteScheduler), or set surrogate='ancestral' to take the density of "
    "the ancestral step between the same noise levels"
)


@dataclass(frozen=True)
class Transition:
    """One step's density.

    Attributes:
        means: ``x0 = means[0] x + means[1] prediction`` and ``mean = means[2] x0 + means[3] x``.
        variance: of every element.
    """

    means: tuple[float, float, float, float]
    variance: float


def check_scheduler(scheduler: Any, surrogate: str | None, variance: str) -> str | None:
    """Whether a scheduler's steps have a transition density that can be followed.

    Returns:
        What to warn of, or None.

    Raises:
        ValueError: they have none and no surrogate is named, or what the step does cannot be followed.
    """
    prediction_type(scheduler)
    names = {kind.__name__ for kind in type(scheduler).__mro__}
    name, config = type(scheduler).__name__, own_config(scheduler)
    if hasattr(scheduler, "precondition_outputs"):
        raise ValueError(f"{name} conditions the denoiser's output in a way of its own (EDM), which DNG does not know; {OTHERS}")
    if not hasattr(scheduler, "add_noise") and not hasattr(scheduler, "scale_noise"):
        raise ValueError(f"{name} does not tell its noise levels (it has no add_noise); {OTHERS}")
    if config.get("thresholding"):
        raise ValueError(f"{name} clips by dynamic thresholding, which DNG cannot follow; set thresholding=False in its config")
    if config.get("variance_type") in ("learned", "learned_range"):
        raise ValueError(f"{name} takes its variance from the denoiser, which DNG cannot follow; use another scheduler")
    if names & set(REDRAWN):
        raise ValueError(f"{name} draws each sample anew around the predicted image, so that no step tells anything; {OTHERS}")
    if surrogate is None and not (names & set(EXACT) or _is_first_order_sde(config)):
        raise ValueError(f"{name} has no transition density; {ADVICE}")
    if names & {"PNDMScheduler"} and not config.get("skip_prk_steps"):
        raise ValueError(f"{name} calls the denoiser several times per step; set skip_prk_steps=True in its config")
    if config.get("variance_type") in ("fixed_large", "fixed_large_log") and variance != "release":
        return (
            f"{name} adds more noise (variance_type={config['variance_type']!r}) than the density that DNG divides by; "
            "set variance_type='fixed_small', or variance='release' to do as the published code does"
        )
    return None


def own_config(scheduler: Any) -> dict[str, Any]:
    """What a scheduler was made with and reads: ``from_config`` carries the keys of other schedulers along."""
    names = inspect.signature(type(scheduler).__init__).parameters
    return {name: value for name, value in scheduler.config.items() if name in names}


def _is_first_order_sde(config: Any) -> bool:
    return config.get("algorithm_type") == "sde-dpmsolver++" and config.get("solver_order") == 1


def clip_range(scheduler: Any) -> float | None:
    """How far the scheduler's step lets the predicted image reach; None if it does not clip."""
    config = own_config(scheduler)
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None


def prediction_type(scheduler: Any) -> str:
    """``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"flow"``."""
    config = own_config(scheduler)
    if "FlowMatch" in type(scheduler).__name__ or config.get("prediction_type") == "flow_prediction":
        return "flow"
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"{type(scheduler).__name__} has prediction_type {kind!r}, which DNG does not know")
    return kind


def clean_from(kind: str, level: Level) -> tuple[float, float]:
    """``x0 = c[0] x + c[1] prediction`` at a noise level."""
    a, b = level.signal, level.noise
    if kind == "epsilon":
        return 1 / a, -b / a
    if kind == "v_prediction":
        square = a * a + b * b
        return a / square, -b / square**0.5
    return (0.0, 1.0) if kind == "sample" else (1.0, -b)


def transition(kind: str, level: Level, following: Level, variance: str) -> Transition | None:
    """The density of the step from one noise level to the following; None where it has none (no noise is left, or none is taken).

    Args:
        variance: ``"posterior"``, or ``"release"``: the published code takes the predicted image for the mean of the last step and
            divides by the noise that the sample held.
    """
    a, b = level.signal, level.noise
    if following.noise == 0:
        if variance != "release":
            return None
        return Transition((*clean_from(kind, level), following.signal, 0.0), b * b / (a * a + b * b))
    r = (following.noise * a / (following.signal * b)) ** 2
    if r >= 1:
        return None
    mean = following.signal * (1 - r), following.noise**2 * a / (following.signal * b * b)
    return Transition((*clean_from(kind, level), *mean), following.noise**2 * (1 - r))


def transitions(scheduler: Any, level: Callable[[int], Level], positions: int, variance: str) -> dict[int, Transition]:
    """By position, the steps that have a density.

    A second-order sampler calls the denoiser twice per step: its step begins at every second position.
    """
    kind, order = prediction_type(scheduler), getattr(scheduler, "order", 1)
    found = {}
    for position in range(0, positions, order):
        step = transition(kind, level(position), level(position + order), variance)
        if step is not None:
            found[position] = step
    return found
