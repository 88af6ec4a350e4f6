"""The ``cpu`` backend: the native kernels of ``kernels/cpu``, called through their C interface."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
from ctypes import byref
from pathlib import Path

import torch
from torch import Tensor

from negengine.kernels.call import Call
from negengine.kernels.cpu import library
from negengine.kernels.cpu.library import (
    MATCHINGS,
    SEARCHES,
    Branches,
    MergeArguments,
    NagArguments,
    Problem,
    Transition,
    Workspace,
)
from negengine.kernels.guidance import Branches as Predictions
from negengine.kernels.guidance import Evidence, Guide, Nag
from negengine.ops.registry import Backend, Guidance, register_backend

WORKSPACE_BYTES = 64 * 2**20  # kept between calls
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ERRORS: dict[int, type[Exception]] = {5: RuntimeError, 6: MemoryError}  # all others: ValueError


def parallel_of_torch() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch runs on; None where torch runs on something else.

    After an operator torch's threads spin for milliseconds, waiting for the next, and threads of our own would have to share the
    cores with them: at sdxl-32, bfloat16, a call took 16.3 instead of 11.0 ms on two cores, an exact one 23.8 instead of 19.2.
    """
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        with contextlib.suppress(OSError, AttributeError):  # the symbol is looked up in what that library was linked to
            return ctypes.cast(ctypes.CDLL(str(folder / name)).GOMP_parallel, ctypes.c_void_p).value
    return None


_lock = threading.Lock()
_forked = False  # a child has none of the threads that its parent's OpenMP runtime believes in
_workspaces: dict[int, Workspace] = {}  # by process: one inherited through fork() may be locked for ever, and is left alone


def workspace() -> Workspace:
    """Memory and threads of all calls of this process; ``workspace().release()`` gives the memory back."""
    found = _workspaces.get(os.getpid())
    if found is None:
        with _lock:
            found = _workspaces.get(os.getpid())
            if found is None:
                found = _workspaces[os.getpid()] = Workspace(WORKSPACE_BYTES, None if _forked else parallel_of_torch())
    return found


def _after_fork() -> None:
    global _lock, _forked
    _lock, _forked = threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _refuses(device: torch.device, dtype: torch.dtype, search: str) -> str | None:
    if device.type != "cpu":
        return "runs on CPUs only"
    if dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if search not in SEARCHES:
        return f"has no search={search!r}"
    if search in ("bf16", "int8") and not library.library().negengine_supports(SEARCHES[search]):
        return f"has no search={search!r} with {library.isa()}; it needs AVX-512 {'BF16' if search == 'bf16' else 'VNNI'}"
    return None


def precision(dtype: torch.dtype, search: str) -> str:
    """What a search multiplies on this machine: ``"fp32"``, ``"bf16"`` or ``"int8"``."""
    return library.library().negengine_precision(_DTYPES[dtype], SEARCHES[search]).decode()


def _adjacent(x: Tensor) -> Tensor:
    """``x`` with adjacent channels."""
    return x if x.stride(2) == 1 else x.contiguous()


def _problem(call: Call, x: Tensor, bank: Tensor) -> Problem:
    """``x`` and ``bank``: those of the call, with adjacent channels."""
    (B, T, D), (R, M, _), mask = x.shape, bank.shape, call.mask
    return Problem(
        x.data_ptr(),
        bank.data_ptr(),
        call.references.data_ptr(),
        None if mask is None else mask.data_ptr(),
        *(B, T, D, R, M, call.references.shape[1]),
        *x.stride()[:2],
        *bank.stride()[:2],
        *call.references.stride(),
        *((0, 0) if mask is None else mask.stride()),
        _DTYPES[x.dtype],
        MATCHINGS[call.matching],
        SEARCHES[call.search],
        torch.get_num_threads(),
    )


def _native(name: str, *arguments: object) -> None:
    status = getattr(library.library(), name)(workspace().handle, *arguments)
    if status:
        text = library.library().negengine_status_text(status).decode()
        raise _ERRORS.get(status, ValueError)(f"the cpu backend: {text}")


def _match(call: Call) -> tuple[Tensor, Tensor]:
    cosine = torch.empty(call.x.shape[:2], dtype=torch.float32)
    index = torch.empty(call.x.shape[:2], dtype=torch.int32)
    x, bank = _adjacent(call.x), _adjacent(call.bank)
    _native("negengine_match", byref(_problem(call, x, bank)), cosine.data_ptr(), index.data_ptr())
    return cosine, index


def _run(call: Call) -> None:
    x, bank, y = _adjacent(call.x), _adjacent(call.bank), call.y
    alpha, keep, stats = call.alpha, call.keep, call.stats
    target = y if y.stride(2) == 1 else x if y is call.x else torch.empty(x.shape, dtype=x.dtype)
    arguments = MergeArguments(
        target.data_ptr(),
        alpha.data_ptr(),
        call.threshold.data_ptr(),
        None if keep is None else keep.data_ptr(),
        None if stats is None else stats.data_ptr(),
        *target.stride()[:2],
        *alpha.stride(),
        *((0, 0) if keep is None else keep.stride()),
        0 if stats is None else stats.stride(0),
    )
    _native("negengine_negtome", byref(_problem(call, x, bank)), byref(arguments))
    if target is not y:
        y.copy_(target)


# --- guidance ----------------------------------------------------------------------------------------------------


def _branches(given: Predictions) -> Branches:
    u = given.unconditional
    return Branches(
        given.conditional.data_ptr(),
        given.negative.data_ptr(),
        None if u is None else u.data_ptr(),
        *given.conditional.shape,
        given.conditional.stride(0),
        given.negative.stride(0),
        0 if u is None else u.stride(0),
        0.0 if given.guidance is None else given.guidance.item(),
        _DTYPES[given.conditional.dtype],
        given.guide_negative,
        torch.get_num_threads(),
    )


def _guide(call: Guide) -> None:
    strength = call.strength.double()
    _native("negengine_guide", byref(_branches(call.branches)), strength.data_ptr(), call.copies, call.out.data_ptr())


def _evidence(call: Evidence) -> Tensor:
    sums = torch.empty(3, len(call.sample), dtype=torch.float64)
    transition = Transition(
        call.sample.data_ptr(),
        call.previous.data_ptr(),
        call.sample.stride(0),
        call.previous.stride(0),
        tuple(call.means.tolist()),
        math.inf if call.clip is None else call.clip,
        _DTYPES[call.sample.dtype],
        _DTYPES[call.previous.dtype],
    )
    _native("negengine_evidence", byref(_branches(call.branches)), byref(transition), sums.data_ptr())
    return sums


def _nag(call: Nag) -> None:
    z, away, out, other = call.positive, call.negative, call.out, call.other
    arguments = NagArguments(
        z.data_ptr(),
        away.data_ptr(),
        out.data_ptr(),
        None if other is None else other.data_ptr(),
        *z.shape,
        *z.stride()[:2],
        *away.stride()[:2],
        *out.stride()[:2],
        *((0, 0) if other is None else other.stride()[:2]),
        *(call.scale, call.tau, call.alpha),
        _DTYPES[z.dtype],
        torch.get_num_threads(),
    )
    _native("negengine_nag", byref(arguments))


_GUIDANCE = Guidance(lambda device, dtype: _refuses(device, dtype, "exact"), _guide, _evidence, _nag)

register_backend(Backend("cpu", missing=library.missing, refuses=_refuses, match=_match, run=_run, guidance=_GUIDANCE))
