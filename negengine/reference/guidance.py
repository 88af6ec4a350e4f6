"""Guidance away from something, in plain PyTorch: the definition that every backend is tested against.

Written to be read beside the papers: dynamic negative guidance (Koulischer et al., arXiv 2410.14398) and normalized
attention guidance (Chen et al., arXiv 2505.21179). Run it on float64 tensors for the oracle, on any other float
dtype for "what torch itself would give": then every step is rounded to that dtype.

Notation: ``c``, ``n`` and ``u`` are the denoiser's predictions for the prompt, for what is to be avoided, and for no prompt at all,
one row for each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """One value for each image, ``[n]`` or ``[1]``, in the dtype of ``like`` and of a shape that multiplies it."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def branches(
    conditional: Tensor,
    negative: Tensor,
    unconditional: Tensor | None = None,
    guidance: Tensor | None = None,
    guide_negative: bool = False,
) -> tuple[Tensor, Tensor]:
    """The base prediction ``e`` and the avoided one ``m``.

    ``e = c``, or ``u + g (c - u)`` with classifier-free guidance; ``m = n``, or ``u + g (n - u)`` where it is guided like the base.
    """
    if unconditional is None:
        return conditional, negative
    assert guidance is not None
    g = per_image(guidance, conditional)
    base = unconditional + g * (conditional - unconditional)
    return base, unconditional + g * (negative - unconditional) if guide_negative else negative


def guide(
    conditional: Tensor,
    negative: Tensor,
    strength: Tensor,
    unconditional: Tensor | None = None,
    guidance: Tensor | None = None,
    guide_negative: bool = False,
    copies: int = 1,
) -> Tensor:
    """``e + lambda (e - m)``, ``copies`` times one after another.

    Args:
        conditional, negative, unconditional: ``[n, ...]``, of one dtype.
        strength: ``[n]``, the lambda of each image. guidance: ``[1]``, the scale of classifier-free guidance.
        guide_negative: see :func:`branches`.
    """
    base, avoided = branches(conditional, negative, unconditional, guidance, guide_negative)
    return torch.cat([base + per_image(strength, base) * (base - avoided)] * copies)


def clean(sample: Tensor, prediction: Tensor, means: Tensor, clip: float | None = None) -> Tensor:
    """The clean image of a prediction: ``x0 = means[0] sample + means[1] prediction``, clamped to ``[-clip, clip]``."""
    x0 = means[0] * sample + means[1] * prediction
    return x0 if clip is None else x0.clamp(-clip, clip)


def squares(
    sample: Tensor,
    previous: Tensor,
    conditional: Tensor,
    negative: Tensor,
    means: Tensor,
    unconditional: Tensor | None = None,
    guidance: Tensor | None = None,
    guide_negative: bool = False,
    clip: float | None = None,
) -> Tensor:
    """How far ``previous`` is from the mean that each prediction gives it, squared, element by element, ``[3, n, ...]``.

    With ``x0_a`` of :func:`clean`, ``mu_a = means[2] x0_a + means[3] sample`` and ``d_a = previous - mu_a``: row 0 is
    ``d_m^2 - d_e^2``, row 1 ``d_m^2``, row 2 ``d_e^2``. Row 0 is the product ``(d_m - d_e)(d_m + d_e)``, of which the first factor
    is ``means[2] (x0_e - x0_m)``: nothing of the size of ``previous`` cancels.

    Args:
        sample, previous: ``[n, ...]``, the noisy sample and what the sampler made of it.
        conditional, negative, unconditional, guidance, guide_negative: see :func:`branches`.
        means: ``[4]``, all that the schedule has to say; see :func:`means_of`.
    """
    base, avoided = branches(conditional, negative, unconditional, guidance, guide_negative)
    m = means.to(torch.promote_types(sample.dtype, base.dtype))
    x0_base, x0_avoided = (clean(sample, one, m, clip) for one in (base, avoided))
    d_base, d_avoided = (previous - (m[2] * x0 + m[3] * sample) for x0 in (x0_base, x0_avoided))
    return torch.stack([m[2] * (x0_base - x0_avoided) * (d_avoided + d_base), d_avoided.square(), d_base.square()])


def evidence(*args: Any, **kwargs: Any) -> Tensor:
    """``|previous - mu_m|^2 - |previous - mu_e|^2`` of each image, ``[n]``; arguments as for :func:`squares`."""
    return squares(*args, **kwargs)[0].flatten(1).sum(1)


def distances(*args: Any, **kwargs: Any) -> Tensor:
    """Both squared distances of each image, ``[2, n]``: to the mean of the avoided prediction, and to that of the base."""
    return squares(*args, **kwargs)[1:].flatten(2).sum(2)


def nag(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Normalized attention guidance of one stream of tokens.

    ``g = z+ + (scale - 1)(z+ - z-)`` is held to at most ``tau`` times the L1 norm of ``z+``, token by token, and blended:
    ``alpha g + (1 - alpha) z+``.

    Args:
        positive, negative: ``[B, T, D]``, attention outputs of one block with the positive and the negative text.
    """
    g = positive + (scale - 1) * (positive - negative)
    size, most = g.abs().sum(-1, keepdim=True), tau * positive.abs().sum(-1, keepdim=True)
    factor = torch.where(size == 0, 1.0, most / size).clamp_max(1).to(g.dtype)
    return alpha * (g * factor) + (1 - alpha) * positive


def means_of(alpha_bar: float, alpha_bar_previous: float) -> Sequence[float]:
    """The ``means`` of the ancestral (DDPM) step between two noise levels, for predictions of the noise.

    ``x0 = (x - sqrt(1 - abar) eps) / sqrt(abar)`` and, with ``a = abar / abar_prev``,
    ``mu = sqrt(abar_prev) (1 - a) / (1 - abar) x0 + sqrt(a) (1 - abar_prev) / (1 - abar) x`` (Ho et al., 2020, equation 7).
    """
    a = alpha_bar / alpha_bar_previous
    return (
        alpha_bar**-0.5,
        -((1 / alpha_bar - 1) ** 0.5),
        alpha_bar_previous**0.5 * (1 - a) / (1 - alpha_bar),
        a**0.5 * (1 - alpha_bar_previous) / (1 - alpha_bar),
    )
