"""Safe latent diffusion in plain torch: one step's guidance away from a concept (SLD, Schramowski et al., arXiv 2211.05105)."""

from __future__ import annotations

import torch
from torch import Tensor

VARIANTS = ("paper", "dng")


def sld(
    unconditional: Tensor | None,
    conditional: Tensor,
    negative: Tensor,
    nu: Tensor | None,
    *,
    scale: float,
    threshold: float,
    momentum_scale: float,
    momentum: float,
    variant: str = "paper",
    outer: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """What the guidance is reduced by in one step, and the momentum for the next.

    With ``d = conditional - negative`` and ``m = min(|d| * scale, 1)`` where ``d < threshold``, 0 elsewhere (signed, element by
    element)::

        g  = m * direction + momentum_scale * nu
        nu = momentum * nu + (1 - momentum) * g

    ``"paper"``: ``direction = negative - unconditional``, and the prediction is ``e_0 + w * (e_p - e_0 - term)``, with ``w`` the
    guidance scale. ``"dng"``, as in the code published with DNG: ``conditional`` is the base prediction ``e`` (with its guidance,
    if it has any), ``direction = negative - e``, and the prediction is ``e - term``.

    Args:
        unconditional: ``e_0``, any shape and floating dtype; ``"dng"`` does not read it, None will do.
        conditional: ``e_p`` (``e`` of ``"dng"``), of the same shape. negative: ``e_S``, that for the concept, of the same shape.
        nu: momentum, as the step before returned it; None in the first step: zeros.
        scale: ``s_S``. threshold: ``lambda``. momentum_scale: ``s_m``. momentum: ``beta_m``.
        variant: one of :data:`VARIANTS`.
        outer: factor of the term; it does not reach the momentum.

    Returns:
        The term ``outer * g`` and the new momentum, both float32 (float64 for float64 predictions) and of the inputs' shape.
        During the warm-up the caller leaves the term out, and the momentum goes on.

    Raises:
        ValueError: another variant, predictions or momentum of different shapes, no unconditional one for ``"paper"``.
    """
    _check(unconditional, conditional, negative, nu, variant)
    wide = torch.promote_types(torch.promote_types(conditional.dtype, negative.dtype), torch.float32)
    e_p, e_s = conditional.to(wide), negative.to(wide)
    base = e_p if unconditional is None or variant == "dng" else unconditional.to(wide)
    nu = torch.zeros_like(e_p) if nu is None else nu.to(wide)
    difference = e_p - e_s
    share = (difference.abs() * scale).clamp_max(1).masked_fill(difference >= threshold, 0)
    g = share * (e_s - base) + momentum_scale * nu
    return outer * g, momentum * nu + (1 - momentum) * g


def _check(unconditional: Tensor | None, conditional: Tensor, negative: Tensor, nu: Tensor | None, variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if variant == "paper" and unconditional is None:
        raise ValueError("variant='paper' needs the unconditional prediction; variant='dng' does without")
    for name, x in (("unconditional", unconditional), ("negative", negative), ("nu", nu)):
        if x is not None and x.shape != conditional.shape:
            raise ValueError(f"{name} has the shape {list(x.shape)}, conditional {list(conditional.shape)}; make them equal")
