"""What is said of a call of NegToMe before anything is done: shapes, dtypes, devices, and tables that can be read.

Everything is checked once a call: by the operators themselves, since exported programs and C++ call those, or, where a compiler
follows the functions that users call, before it gets there. A compiler must be able to let the number of images vary, which
``len`` of a tensor forbids.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from negengine.kernels.call import Call
from negengine.ops import registry
from negengine.reference import MATCHINGS, is_disjoint


def check_tokens(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.ndim != 3:
        raise ValueError(f"x must have shape [B, T, D], got {list(x.shape)}")


def check_call(call: Call, backend: str | None) -> None:
    """All that can be said without reading a tensor's values."""
    x, bank, references, matching = call.x, call.bank, call.references, call.matching
    check_tokens(x)
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if torch.is_grad_enabled() and (x.requires_grad or bank.requires_grad):
        raise RuntimeError("NegToMe is not differentiable; call it under torch.no_grad() or torch.inference_mode()")
    if matching not in MATCHINGS:
        raise ValueError(f"matching must be one of {MATCHINGS}, got {matching!r}")
    (B, T, D), device = x.shape, x.device
    if bank is not x:
        if bank.ndim != 3 or bank.shape[-1] != D:
            raise ValueError(f"the reference must have the {D} channels of x, got shape {list(bank.shape)}")
        if bank.dtype != x.dtype or bank.device != device:
            raise TypeError(f"the reference is {bank.dtype} on {bank.device}, x is {x.dtype} on {device}; they must agree")
    R, M, _ = bank.shape
    if M == 0 or D == 0 or R == 0:
        raise ValueError(f"the reference is empty: shape {[R, M, D]}")
    if references.ndim != 2 or references.shape[0] != B or references.shape[1] == 0:
        raise ValueError(f"references must have shape [{B}, K] with K >= 1, got {list(references.shape)}")
    if references.dtype != torch.int32:
        raise TypeError(f"references must be int32, got {references.dtype}")
    if references.device != device:
        raise TypeError(f"references is on {references.device}, x on {device}; they must agree")
    if call.table is not None:
        _check_entries(call, call.table)
    if call.mask is not None:
        check_tensor("mask", call.mask, torch.bool, (R, M), device)
    if call.keep is not None:
        check_tensor("keep", call.keep, torch.bool, (B, T), device)
    if call.stats is not None:
        check_tensor("stats", call.stats, torch.int64, (3,), device)
    if matching == "release" and (references.shape[1] != 1 or T != M):
        raise ValueError(
            "matching='release' is defined for one reference image with as many tokens as the source only, "
            f"got {references.shape[1]} reference images of {M} tokens for {T} source tokens; "
            "use matching='paper'"
        )
    if backend is not None:
        registry.known(backend)
    if call.search not in registry.SEARCHES:
        raise ValueError(f"search must be one of {registry.SEARCHES}, got {call.search!r}")


def _check_entries(call: Call, entries: Sequence[int]) -> None:
    (B, K), R = call.references.shape, len(call.bank)
    if len(entries) != B * K:
        raise ValueError(f"table must have the {B * K} entries of references, got {len(entries)}")
    last, disjoint = _last_and_disjoint(tuple(entries), K)
    if last >= R:
        raise ValueError(f"references names image {last} of a bank of {R}")
    if call.disjoint and not disjoint:
        raise ValueError("disjoint=True, but an image of the table both has a reference and is one")


@functools.lru_cache(64)  # a pipeline has a few tables and thousands of calls
def _last_and_disjoint(entries: tuple[int, ...], K: int) -> tuple[int, bool]:
    rows = [entries[start : start + K] for start in range(0, len(entries), K)]
    return max(entries, default=-1), is_disjoint(rows)


def check_values(call: Call) -> None:
    """What was said about the table, where the host can read it."""
    if call.references.device.type != "cpu" or not (call.disjoint or call.table):
        return
    held = [image for row in call.references.tolist() for image in row]
    if call.table is None:
        _check_entries(call, held)
    elif held != list(call.table):
        raise ValueError(f"table must hold the entries of references, {held}, got {list(call.table)}")


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise TypeError(f"{name} is on {tensor.device}, x on {device}; they must agree")
