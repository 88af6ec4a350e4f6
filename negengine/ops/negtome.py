"""The NegToMe operator: cosine search, threshold, extrapolation (arXiv 2412.01339, algorithm 1).

Three operators are registered with ``torch.library``: ``negengine::match``, ``negengine::negtome`` and the in-place
``negengine::negtome_``. References enter as an index table, so that one code path serves the first image of a group,
all others, the previous ones, both halves of classifier-free guidance, several prompts and given pictures.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

# they register themselves, those preferred first
import negengine.ops.cpu  # isort: skip
import negengine.ops.triton  # isort: skip
import negengine.ops.eager  # noqa: F401  # isort: skip
from negengine.kernels.call import Call
from negengine.ops import registry, repeated
from negengine.ops.checks import check_call, check_tensor, check_tokens, check_values

_LIBRARY = torch.library.Library("negengine", "DEF")
_SEARCH = "Tensor? mask, str matching, str search, str? backend"
_MERGE = "Tensor alpha, Tensor threshold, Tensor? keep"
_LIBRARY.define(f"match(Tensor x, Tensor? bank, Tensor references, {_SEARCH}, int[]? table=None) -> (Tensor, Tensor)")
_LIBRARY.define(f"negtome(Tensor x, Tensor? bank, Tensor references, {_MERGE}, {_SEARCH}, int[]? table=None) -> Tensor")
_LIBRARY.define(
    f"negtome_(Tensor(a!) x, Tensor? bank, Tensor references, {_MERGE}, Tensor(b!)? stats, {_SEARCH}, "
    "bool disjoint=False, int[]? table=None) -> ()"
)


# --- what users call ---------------------------------------------------------------------------------------------


def match(
    x: Tensor,
    reference: Tensor,
    mask: Tensor | None = None,
    matching: str = "paper",
    search: str = "auto",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Best reference token of every source token.

    Args:
        x: source tokens ``[B, T, D]``, float16, bfloat16, float32 or float64.
        reference: ``[M, D]`` for all images or ``[B, M, D]``, same dtype and device.
        mask: bool ``[M]`` or ``[B, M]``, true where a token may be matched.
        matching: ``"paper"`` (argmax over the reference) or ``"release"`` (as in the published code; ``M == T``).
        search: ``"auto"`` (fastest that keeps the numeric contract of the dtype), ``"exact"`` (never quantises), or ``"bf16"``,
            ``"int8"``, ``"fp8"``: in that precision, the best candidates scored again exactly.
        backend: name of a backend (see :func:`negengine.ops.backends`); the best usable one if None.

    Returns:
        cosine ``[B, T]`` float32 (``-inf``: nothing to match) and index ``[B, T]`` int32 (``-1``: none).

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices or names. RuntimeError: no backend can take the call.
    """
    bank, references, table, mask = _as_bank(x, reference, mask)
    if torch.compiler.is_compiling():
        check_call(Call(x, bank, references, mask, matching, search), backend)
    return torch.ops.negengine.match(x, bank, references, mask, matching, search, backend, table)


def negtome(
    x: Tensor,
    reference: Tensor,
    alpha: float | Tensor = 0.9,
    threshold: float | Tensor = 0.65,
    mask: Tensor | None = None,
    matching: str = "paper",
    search: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """``y_i = (1 + alpha) x_i - alpha r_j(i)`` where the best cosine exceeds ``threshold``, else ``x_i``.

    Args:
        x, reference, mask, matching, search, backend: see :func:`match`.
        alpha: a number, or a tensor of one number or of ``[B]`` numbers on ``x``'s device (not read on the host).
        threshold: a number in ``[-1, 1]``, or a tensor of one number on ``x``'s device.

    Returns:
        A new tensor ``[B, T, D]``. Not differentiable.

    Raises:
        As :func:`match`; ValueError for an alpha that is not finite or a threshold outside ``[-1, 1]``.
    """
    bank, references, table, mask = _as_bank(x, reference, mask)
    if torch.compiler.is_compiling():
        check_call(Call(x, bank, references, mask, matching, search), backend)
    alpha, threshold = as_alpha(alpha, x), as_threshold(threshold, x)
    return torch.ops.negengine.negtome(x, bank, references, alpha, threshold, None, mask, matching, search, backend, table)


def negtome_(
    x: Tensor,
    references: Tensor,
    alpha: float | Tensor,
    threshold: float | Tensor,
    bank: Tensor | None = None,
    mask: Tensor | None = None,
    keep: Tensor | None = None,
    stats: Tensor | None = None,
    matching: str = "paper",
    search: str = "auto",
    backend: str | None = None,
    disjoint: bool = False,
    table: Sequence[int] | None = None,
) -> Tensor:
    """NegToMe in place, every image against its own set of reference images.

    Args:
        x: ``[B, T, D]``, overwritten; unit inner stride.
        references: int32 ``[B, K]``: row ``b`` lists the bank's images that image ``b`` is pushed away from, padded with
            ``-1`` (see :func:`negengine.reference.group_references`).
        alpha, threshold: as in :func:`negtome`.
        bank: ``[R, M, D]``; ``x`` itself if None. All reads are of values from before the update.
        mask: bool ``[R, M]``. keep: bool ``[B, T]``, false drops a token from merging.
        stats: int64 ``[3]``; merged tokens, tokens that had a reference, and one call are added to it.
        matching: ``"release"`` needs ``K == 1``.
        disjoint: the caller's word that no image of ``x`` both has a reference and is one (as of mode ``first``; see
            :func:`negengine.reference.is_disjoint`): then no backend sets memory aside for rows that are read after they may
            have been overwritten. It says nothing about a ``bank``. It is checked where the host knows the table; elsewhere
            an image that breaks the promise may stay as it is.
        table: the entries of ``references`` row by row, where the caller knows them: a device's own are never read by the
            host. With them a backend does nothing for images without a reference. Compared with a table on the CPU; of one
            on a device they are the caller's word.

    Returns:
        ``x``.

    Raises:
        As :func:`negtome`; ValueError for a table that is not ``disjoint`` though it was said to be, and for a ``table`` that is
        not that of ``references`` or names an image that the bank lacks.
    """
    check_tokens(x)
    if torch.compiler.is_compiling():
        bank_or_own = x if bank is None else bank
        check_call(Call(x, bank_or_own, references, mask, matching, search, keep=keep, stats=stats, table=table), backend)
    if 0 in x.stride() and any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError("x repeats the same memory (an expanded tensor) and cannot be overwritten; call x.contiguous() first")
    given = (as_alpha(alpha, x), as_threshold(threshold, x), keep, stats, mask, matching, search, backend, disjoint, table)
    if not torch.compiler.is_compiling() and repeated.applies(x):
        call, backend = _negtome_record(x, bank, references, *given)
        repeated.run(call, backend, _settle)
    else:
        torch.ops.negengine.negtome_(x, bank, references, *given)
    return x


def as_alpha(alpha: float | Tensor, x: Tensor) -> Tensor:
    """``alpha`` as float64 ``[B]`` on ``x``'s device."""
    if isinstance(alpha, Tensor):
        if alpha.numel() not in (1, x.shape[0]):
            raise ValueError(f"alpha has {alpha.numel()} values for a batch of {x.shape[0]}; give one or one per image")
        if alpha.ndim == 1 and alpha.dtype == torch.float64 and alpha.shape[0] == x.shape[0] and alpha.device == x.device:
            return alpha
        return alpha.to(x.device, torch.float64).reshape(-1).expand(x.shape[0])
    if not _within("alpha", alpha, -sys.float_info.max, sys.float_info.max):
        raise ValueError(f"alpha must be finite, got {alpha}")
    return torch.full((x.shape[0],), alpha, dtype=torch.float64, device=x.device)


def as_threshold(threshold: float | Tensor, x: Tensor) -> Tensor:
    """``threshold`` as float64 ``[1]`` on ``x``'s device."""
    if isinstance(threshold, Tensor):
        if threshold.numel() != 1:
            raise ValueError(f"threshold has {threshold.numel()} values; give one")
        if threshold.ndim == 1 and threshold.dtype == torch.float64 and threshold.device == x.device:
            return threshold
        return threshold.to(x.device, torch.float64).reshape(1)
    if not _within("threshold", threshold, -1, 1):
        raise ValueError(f"threshold is compared with a cosine and must lie in [-1, 1], got {threshold}")
    return torch.full((1,), threshold, dtype=torch.float64, device=x.device)


def _within(name: str, number: float, low: float, high: float) -> bool:
    try:
        return low <= number <= high  # compilers follow a comparison of a number that changes
    except TypeError:
        raise TypeError(f"{name} must be a number or a tensor, got {number!r}") from None


def _as_bank(x: Tensor, reference: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, list[int] | None, Tensor | None]:
    """A reference for all or for each image, as bank, index table, its entries, and bank mask."""
    check_tokens(x)
    if not isinstance(reference, Tensor):
        raise TypeError(f"reference must be a tensor, got {type(reference).__name__}")
    B = x.shape[0]
    if reference.ndim not in (2, 3) or (reference.ndim == 3 and reference.shape[0] != B):
        raise ValueError(f"reference must have shape [M, D] or [{B}, M, D], got {list(reference.shape)}")
    M = reference.shape[-2]
    if mask is not None and list(mask.shape) not in ([M], [B, M]):
        raise ValueError(f"mask must have shape [{M}] or [{B}, {M}], got {list(mask.shape)}")
    shared = reference.ndim == 2 and (mask is None or mask.ndim == 1)
    known = not torch.compiler.is_compiling()  # a list is guarded by its values, and each batch size would compile again
    if shared:
        references = torch.zeros(B, 1, dtype=torch.int32, device=x.device)
        return reference[None], references, [0] * B if known else None, None if mask is None else mask[None]
    bank = reference.expand(B, *reference.shape[-2:])
    references = torch.arange(B, dtype=torch.int32, device=x.device)[:, None]
    return bank, references, list(range(B)) if known else None, None if mask is None else mask.expand(B, M)


# --- operators ---------------------------------------------------------------------------------------------------


# Each operator as the record of its call, checked, and the backend that was asked for.


def _match(x, bank, references, mask, matching, search, backend, table=None):  # type: ignore[no-untyped-def]
    call = Call(x, x if bank is None else bank, references, mask, matching, search, table=table)
    check_call(call, backend)
    return call, backend


def _negtome(x, bank, references, alpha, threshold, keep, mask, matching, search, backend, table=None, *, y=None):  # type: ignore[no-untyped-def]
    bank = x if bank is None else bank
    return _checked(Call(x, bank, references, mask, matching, search, y, alpha, threshold, keep, table=table), backend)


def _negtome_record(  # type: ignore[no-untyped-def]
    x, bank, references, alpha, threshold, keep, stats, mask, matching, search, backend, disjoint=False, table=None
):
    own = bank is None
    bank = x if own else bank
    return Call(x, bank, references, mask, matching, search, x, alpha, threshold, keep, stats, disjoint and own, table), backend


def _negtome_(*args, **kwargs):  # type: ignore[no-untyped-def]
    return _checked(*_negtome_record(*args, **kwargs))


def _settle(call: Call, backend: str | None) -> Callable[[Call], None]:
    """Check a call in place and choose its backend, for it and those alike."""
    chosen = _chosen(*_checked(call, backend))
    return chosen.run if chosen.bound is None else chosen.bound(call)


def _checked(call: Call, backend: str | None) -> tuple[Call, str | None]:
    check_call(call, backend)
    check_tensor("alpha", call.alpha, torch.float64, (call.x.shape[0],), call.x.device)
    check_tensor("threshold", call.threshold, torch.float64, (1,), call.x.device)
    return call, backend


def _chosen(call: Call, backend: str | None) -> registry.Backend:
    check_values(call)
    return registry.choose(backend, call.x.device, call.x.dtype, call.search, call)


def _match_impl(*args):  # type: ignore[no-untyped-def]
    call, backend = _match(*args)
    cosine, index = _chosen(call, backend).match(call)
    return cosine.float(), index


def _negtome_impl(*args):  # type: ignore[no-untyped-def]
    call, backend = _negtome(*args, y=args[0].new_empty(args[0].shape))
    _chosen(call, backend).run(call)
    return call.y


def _negtome_inplace_impl(*args):  # type: ignore[no-untyped-def]
    call, backend = _negtome_(*args)
    _chosen(call, backend).run(call)


_LIBRARY.impl("match", _match_impl, "CompositeExplicitAutograd")
_LIBRARY.impl("negtome", _negtome_impl, "CompositeExplicitAutograd")
_LIBRARY.impl("negtome_", _negtome_inplace_impl, "CompositeExplicitAutograd")


@torch.library.register_fake("negengine::match")
def _match_fake(*args):  # type: ignore[no-untyped-def]
    call, backend = _match(*args)
    _name_choice(call, backend)
    tokens = call.x.shape[:2]
    return call.x.new_empty(tokens, dtype=torch.float32), call.x.new_empty(tokens, dtype=torch.int32)


@torch.library.register_fake("negengine::negtome")
def _negtome_fake(*args):  # type: ignore[no-untyped-def]
    call, backend = _negtome(*args)
    _name_choice(call, backend)
    return call.x.new_empty(call.x.shape)


@torch.library.register_fake("negengine::negtome_")
def _negtome_inplace_fake(*args):  # type: ignore[no-untyped-def]
    _name_choice(*_negtome_(*args))


# --- graphs ------------------------------------------------------------------------------------------------------


_CHOICE = re.compile(r"\[negengine[^]]*\]")


def _name_choice(call: Call, backend: str | None) -> None:
    """Make the chosen backend part of the name under which torch keeps compiled graphs on disk.

    There a graph is found by its operators, before they open into the kernels of a backend: without this, a graph of another
    version of the kernels, or of a backend that has been found wrong since, would be taken for this one.
    """
    from torch.compiler import config

    chosen, _ = registry.find(backend, call.x.device, call.x.dtype, call.search, call)
    name = "" if chosen is None else f"[negengine {chosen.name} {chosen.fingerprint()}]"
    config.cache_key_tag = _CHOICE.sub("", config.cache_key_tag) + name


def _show_inside(name: str, record: Callable[..., tuple[Call, str | None]]) -> None:
    """Let compilers see what the chosen backend does, where it can be seen; an operator that stays opaque says so by itself."""
    arguments = [argument.name for argument in getattr(torch.ops.negengine, name).default._schema.arguments]

    def rule(mode, op, types, args, kwargs):  # type: ignore[no-untyped-def]
        call, backend = record(*args, **kwargs)
        chosen, _ = registry.find(backend, call.x.device, call.x.dtype, call.search, call)
        inside = None if chosen is None else chosen.traced.get(name)
        if inside is None:
            return mode.__torch_dispatch__(op, types, args, kwargs)
        given = dict(zip(arguments, args, strict=False)) | kwargs
        del given["backend"]
        with mode:
            return inside(**given)

    torch.library.register_torch_dispatch(f"negengine::{name}", FunctionalTensorMode, rule, lib=_LIBRARY)


for _name, _record in (("match", _match), ("negtome", _negtome), ("negtome_", _negtome_)):
    _show_inside(_name, _record)
