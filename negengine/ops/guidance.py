"""Guidance away from a prediction or an attention output, one pass over memory each.

Dynamic negative guidance (Koulischer et al., arXiv 2410.14398) needs two: :func:`guide`, its update and that of negative prompting,
and :func:`evidence`, what a step says about the avoided class. Normalized attention guidance (Chen et al., arXiv 2505.21179) needs
:func:`nag`. The operators registered with ``torch.library`` are ``negengine::guide``, ``negengine::evidence``, ``negengine::nag`` and
the in-place ``negengine::nag_`` and ``negengine::nag_both_``; in compiled graphs they stay whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import negengine.ops.negtome  # noqa: F401  # the backends register themselves
from negengine.kernels import guidance as calls
from negengine.ops import registry

_LIBRARY = torch.library.Library("negengine", "FRAGMENT")
_CFG = "Tensor? unconditional, Tensor? guidance, bool guide_negative"
_LIBRARY.define(f"guide(Tensor conditional, Tensor negative, Tensor strength, {_CFG}, SymInt copies, str? backend) -> Tensor")
_LIBRARY.define(
    f"evidence(Tensor sample, Tensor previous, Tensor conditional, Tensor negative, Tensor means, {_CFG}, float? clip, "
    "str? backend) -> Tensor"
)
_NAG = "float scale, float tau, float alpha, str? backend"
_LIBRARY.define(f"nag(Tensor positive, Tensor negative, {_NAG}) -> Tensor")
_LIBRARY.define(f"nag_(Tensor(a!) positive, Tensor negative, {_NAG}) -> ()")
_LIBRARY.define(f"nag_both_(Tensor(a!) positive, Tensor(b!) negative, {_NAG}) -> ()")


# --- what users call ---------------------------------------------------------------------------------------------


def guide(
    conditional: Tensor,
    negative: Tensor,
    strength: Tensor,
    unconditional: Tensor | None = None,
    guidance: Tensor | None = None,
    guide_negative: bool = False,
    copies: int = 1,
    backend: str | None = None,
) -> Tensor:
    """A prediction pushed away from another: the guided noise of arXiv 2410.14398; with a constant strength, negative prompting.

    ``e - lambda (m - e)``, where ``e`` is ``conditional`` and ``m`` is ``negative``, or, with classifier-free guidance,
    ``e = u + g (conditional - u)`` and, where ``guide_negative``, ``m = u + g (negative - u)``. Computed in float32, rounded once.

    Args:
        conditional, negative: predictions ``[n, ...]``, one dtype: float16, bfloat16, float32 or float64. Rows of one batch need
            no copy.
        strength: float32 or float64 ``[n]`` on their device, the lambda of each image.
        unconditional: ``[n, ...]``, with ``guidance``.
        guidance: float32 or float64 ``[1]`` on their device, the scale of classifier-free guidance.
        guide_negative: guide the negative prediction like the base.
        copies: how often the result is written, one after another: pipelines combine the rows of a doubled batch.
        backend: name of a backend (see :func:`negengine.ops.backends`); the best usable one if None.

    Returns:
        A new tensor ``[copies * n, ...]`` in the dtype of ``conditional``, contiguous.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices or names, or one of ``unconditional`` and ``guidance`` alone.
        RuntimeError: no backend can take the call.
    """
    return torch.ops.negengine.guide(conditional, negative, strength, unconditional, guidance, guide_negative, copies, backend)


def evidence(
    sample: Tensor,
    previous: Tensor,
    conditional: Tensor,
    negative: Tensor,
    means: Tensor,
    unconditional: Tensor | None = None,
    guidance: Tensor | None = None,
    guide_negative: bool = False,
    clip: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """What a sampling step says for the base prediction and against the avoided one: the likelihood ratio of arXiv 2410.14398.

    For ``a`` of the predictions ``e`` and ``m`` of :func:`guide`: ``x0_a = means[0] sample + means[1] a``, clamped to
    ``[-clip, clip]``, and ``mu_a = means[2] x0_a + means[3] sample``. Returned is ``|previous - mu_m|^2 - |previous - mu_e|^2``,
    summed over each image from ``(d_m - d_e)(d_m + d_e)`` of each element, which does not cancel. Computed in float32, partial sums
    added in float64 in a fixed order: the same bits from run to run, whatever the number of threads.

    Args:
        sample, previous: ``[n, ...]``, the noisy sample and what the sampler made of it; any float dtypes.
        conditional, negative, unconditional, guidance, guide_negative, backend: as for :func:`guide`.
        means: float64 ``[4]`` on their device; see :func:`negengine.reference.guidance.means_of`.
        clip: the scheduler's clipping of the clean image, None if it has none.

    Returns:
        float64 ``[n]``; of an image that holds a NaN, NaN.

    Raises:
        As :func:`guide`; ValueError for a ``clip`` that is not positive.
    """
    return torch.ops.negengine.evidence(
        sample, previous, conditional, negative, means, unconditional, guidance, guide_negative, clip, backend
    )[0]


def distances(
    sample: Tensor,
    previous: Tensor,
    conditional: Tensor,
    negative: Tensor,
    means: Tensor,
    unconditional: Tensor | None = None,
    guidance: Tensor | None = None,
    guide_negative: bool = False,
    clip: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Both squared distances of :func:`evidence`, from the same pass: float64 ``[2, n]``.

    Row 0 is ``|previous - mu_m|^2`` of the avoided prediction, row 1 ``|previous - mu_e|^2`` of the base. Their difference cancels;
    take :func:`evidence` for that.
    """
    return torch.ops.negengine.evidence(
        sample, previous, conditional, negative, means, unconditional, guidance, guide_negative, clip, backend
    )[1:]


def nag(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float, backend: str | None = None) -> Tensor:
    """Normalized attention guidance (arXiv 2505.21179: extrapolation, normalization, refinement) into a new tensor.

    ``g = z+ + (scale - 1)(z+ - z-)``; each token's ``g`` is scaled down to at most ``tau`` times the L1 norm of ``z+``;
    the result is ``alpha g + (1 - alpha) z+``. Computed in float32, rounded once.

    Args:
        positive, negative: attention outputs ``[B, T, D]`` with the positive and the negative text, one dtype: float16, bfloat16,
            float32 or float64. Any strides of images and tokens, as of ``x[:, text:]``.
        scale, tau, alpha: the authors' code for FLUX has 5, 2.5 and 0.25.
        backend: name of a backend (see :func:`negengine.ops.backends`); the best usable one if None.

    Returns:
        A new tensor ``[B, T, D]``, contiguous.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices, names or numbers. RuntimeError: no backend can take the call.
    """
    return torch.ops.negengine.nag(positive, negative, scale, tau, alpha, backend)


def nag_(
    positive: Tensor,
    negative: Tensor,
    scale: float,
    tau: float,
    alpha: float,
    both: bool = False,
    backend: str | None = None,
) -> Tensor:
    """As :func:`nag`, written into ``positive``, and where ``both`` into ``negative`` as well, so that they stay one image stream.

    The two may lie in one tensor but must not overlap.

    Returns:
        ``positive``.

    Raises:
        As :func:`nag`; ValueError for an expanded tensor that would be written to.
    """
    operator = torch.ops.negengine.nag_both_ if both else torch.ops.negengine.nag_
    operator(positive, negative, scale, tau, alpha, backend)
    return positive


# --- checks ------------------------------------------------------------------------------------------------------


def _check_like(name: str, tensor: Tensor, other: str, like: Tensor, dtype: bool = True) -> None:
    if tensor.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {other}, {list(like.shape)}, got {list(tensor.shape)}")
    if dtype and tensor.dtype != like.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, {other} is {like.dtype}; they must agree")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tensor.device != like.device:
        raise TypeError(f"{name} is on {tensor.device}, {other} on {like.device}; they must agree")


def _check_numbers(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], length: int, device: torch.device) -> None:
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {names}, got {tensor.dtype}")
    if tensor.ndim != 1 or len(tensor) != length:
        raise ValueError(f"{name} must have shape [{length}], got {list(tensor.shape)}")
    if tensor.device != device:
        raise TypeError(f"{name} is on {tensor.device}, the predictions on {device}; they must agree")


def _check_gradients(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError("guidance is not differentiable; call it under torch.no_grad() or torch.inference_mode()")


REALS = (torch.float32, torch.float64)


def _check_branches(conditional: Tensor, negative: Tensor, unconditional: Tensor | None, guidance: Tensor | None) -> None:
    if not conditional.is_floating_point():
        raise TypeError(f"conditional must be a floating-point tensor, got {conditional.dtype}")
    if conditional.ndim < 2:
        raise ValueError(f"predictions must have shape [n, ...], got {list(conditional.shape)}")
    _check_like("negative", negative, "conditional", conditional)
    if (unconditional is None) != (guidance is None):
        raise ValueError("classifier-free guidance needs both unconditional and guidance, got one of them")
    if unconditional is not None and guidance is not None:
        _check_like("unconditional", unconditional, "conditional", conditional)
        _check_numbers("guidance", guidance, REALS, 1, conditional.device)
    _check_gradients(conditional, negative, unconditional, guidance)


def _check_guide(conditional, negative, strength, unconditional, guidance, copies, backend):  # type: ignore[no-untyped-def]
    _check_branches(conditional, negative, unconditional, guidance)
    _check_numbers("strength", strength, REALS, len(conditional), conditional.device)
    _check_gradients(strength)
    if copies < 1:
        raise ValueError(f"copies must be 1 or more, got {copies}")
    _check_name(backend)


def _check_evidence(sample, previous, conditional, negative, means, unconditional, guidance, clip, backend):  # type: ignore[no-untyped-def]
    _check_branches(conditional, negative, unconditional, guidance)
    _check_like("sample", sample, "conditional", conditional, dtype=False)
    _check_like("previous", previous, "conditional", conditional, dtype=False)
    _check_numbers("means", means, (torch.float64,), 4, conditional.device)
    _check_gradients(sample, previous, means)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    _check_name(backend)


def _check_nag(positive, negative, scale, tau, alpha, backend, written=()):  # type: ignore[no-untyped-def]
    if positive.ndim != 3:
        raise ValueError(f"positive must have shape [B, T, D], got {list(positive.shape)}")
    if not positive.is_floating_point():
        raise TypeError(f"positive must be a floating-point tensor, got {positive.dtype}")
    _check_like("negative", negative, "positive", positive)
    _check_gradients(positive, negative)
    for name, number in (("scale", scale), ("tau", tau), ("alpha", alpha)):
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {number}")
    if tau < 0:
        raise ValueError(f"tau bounds a ratio of norms and must not be negative, got {tau}")
    for name, tensor in written:
        if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"{name} repeats the same memory (an expanded tensor) and cannot be overwritten; call contiguous() first")
    _check_name(backend)


def _check_name(backend: str | None) -> None:
    if backend is not None:
        registry.known(backend)


# --- operators ---------------------------------------------------------------------------------------------------


def _rows(tensor: Tensor) -> Tensor:
    """``[n, size]`` with adjacent elements, a view where that can be."""
    flat = tensor.flatten(1)
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _branches(conditional, negative, unconditional, guidance, guide_negative):  # type: ignore[no-untyped-def]
    base = None if unconditional is None else _rows(unconditional)
    return calls.Branches(_rows(conditional), _rows(negative), base, guidance, guide_negative and base is not None)


def _guided(conditional: Tensor, copies: int) -> Tensor:
    return conditional.new_empty(copies * conditional.shape[0], *conditional.shape[1:])


def _guide_impl(conditional, negative, strength, unconditional, guidance, guide_negative, copies, backend):  # type: ignore[no-untyped-def]
    _check_guide(conditional, negative, strength, unconditional, guidance, copies, backend)
    chosen = registry.choose_guidance(backend, conditional.device, conditional.dtype)
    out = _guided(conditional, copies)
    if out.numel():
        branches = _branches(conditional, negative, unconditional, guidance, guide_negative)
        chosen.guide(calls.Guide(branches, strength.contiguous(), copies, out.view(copies * len(conditional), -1)))
    return out


def _evidence_impl(  # type: ignore[no-untyped-def]
    sample, previous, conditional, negative, means, unconditional, guidance, guide_negative, clip, backend
):
    _check_evidence(sample, previous, conditional, negative, means, unconditional, guidance, clip, backend)
    chosen = registry.choose_guidance(backend, conditional.device, conditional.dtype, sample.dtype, previous.dtype)
    if not conditional.numel():
        return _sums(conditional).zero_()
    branches = _branches(conditional, negative, unconditional, guidance, guide_negative)
    return chosen.evidence(calls.Evidence(branches, _rows(sample), _rows(previous), means.contiguous(), clip))


def _sums(conditional: Tensor) -> Tensor:
    return conditional.new_empty(3, len(conditional), dtype=torch.float64)


def _tokens(tensor: Tensor) -> Tensor:
    """The tensor itself if its channels lie side by side, else a copy."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _nag_impl(positive, negative, scale, tau, alpha, backend):  # type: ignore[no-untyped-def]
    _check_nag(positive, negative, scale, tau, alpha, backend)
    chosen = registry.choose_guidance(backend, positive.device, positive.dtype)
    out = positive.new_empty(positive.shape)
    if out.numel():
        chosen.nag(calls.Nag(_tokens(positive), _tokens(negative), scale, tau, alpha, out, None))
    return out


def _nag_inplace(positive, negative, scale, tau, alpha, backend, both):  # type: ignore[no-untyped-def]
    written = [("positive", positive), ("negative", negative)][: 1 + both]
    _check_nag(positive, negative, scale, tau, alpha, backend, written)
    chosen = registry.choose_guidance(backend, positive.device, positive.dtype)
    if not positive.numel():
        return
    z, other = _tokens(positive), _tokens(negative)
    chosen.nag(calls.Nag(z, other, scale, tau, alpha, z, other if both else None))
    if z is not positive:
        positive.copy_(z)
    if both and other is not negative:
        negative.copy_(other)


def _nag_inplace_impl(*args):  # type: ignore[no-untyped-def]
    _nag_inplace(*args, both=False)


def _nag_both_impl(*args):  # type: ignore[no-untyped-def]
    _nag_inplace(*args, both=True)


for _name, _implementation in (
    ("guide", _guide_impl),
    ("evidence", _evidence_impl),
    ("nag", _nag_impl),
    ("nag_", _nag_inplace_impl),
    ("nag_both_", _nag_both_impl),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("negengine::guide")
def _guide_fake(conditional, negative, strength, unconditional, guidance, guide_negative, copies, backend):  # type: ignore[no-untyped-def]
    _check_guide(conditional, negative, strength, unconditional, guidance, copies, backend)
    return _guided(conditional, copies)


@torch.library.register_fake("negengine::evidence")
def _evidence_fake(  # type: ignore[no-untyped-def]
    sample, previous, conditional, negative, means, unconditional, guidance, guide_negative, clip, backend
):
    _check_evidence(sample, previous, conditional, negative, means, unconditional, guidance, clip, backend)
    return _sums(conditional)


@torch.library.register_fake("negengine::nag")
def _nag_fake(positive, negative, scale, tau, alpha, backend):  # type: ignore[no-untyped-def]
    _check_nag(positive, negative, scale, tau, alpha, backend)
    return positive.new_empty(positive.shape)


@torch.library.register_fake("negengine::nag_")
def _nag_inplace_fake(positive, negative, scale, tau, alpha, backend):  # type: ignore[no-untyped-def]
    _check_nag(positive, negative, scale, tau, alpha, backend, [("positive", positive)])


@torch.library.register_fake("negengine::nag_both_")
def _nag_both_fake(positive, negative, scale, tau, alpha, backend):  # type: ignore[no-untyped-def]
    _check_nag(positive, negative, scale, tau, alpha, backend, [("positive", positive), ("negative", negative)])
