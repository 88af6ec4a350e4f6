"""The C interface as Python sees it."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, Structure, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

from negengine.kernels.cpu.build import FAILURE, NAME

ABI = 3  # NEGENGINE_ABI of include/negengine_cpu.h
FOLDER = Path(__file__).resolve().parent
SEARCHES = {"auto": 0, "exact": 1, "bf16": 2, "int8": 3}
MATCHINGS = {"paper": 0, "release": 1}
ISAS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16")


class Problem(Structure):
    """``negengine_problem``."""

    _fields_ = (
        [(name, c_void_p) for name in ("x", "bank", "references", "mask")]
        + [(name, c_int64) for name in ("B", "T", "D", "R", "M", "K")]
        + [(name, c_int64) for name in ("x_image", "x_token", "bank_image", "bank_token")]
        + [(name, c_int64) for name in ("references_image", "references_slot", "mask_image", "mask_token")]
        + [(name, c_int32) for name in ("dtype", "matching", "search", "threads")]
    )


class MergeArguments(Structure):
    """``negengine_merge_arguments``."""

    _fields_ = [(name, c_void_p) for name in ("y", "alpha", "threshold", "keep", "stats")] + [
        (name, c_int64) for name in ("y_image", "y_token", "alpha_image", "keep_image", "keep_token", "stats_entry")
    ]


class Branches(Structure):
    """``negengine_branches``."""

    _fields_ = (
        [(name, c_void_p) for name in ("conditional", "negative", "unconditional")]
        + [(name, c_int64) for name in ("n", "size", "conditional_image", "negative_image", "unconditional_image")]
        + [("guidance", c_double)]
        + [(name, c_int32) for name in ("dtype", "guide_negative", "threads")]
    )


class Transition(Structure):
    """``negengine_transition``."""

    _fields_ = (
        [(name, c_void_p) for name in ("sample", "previous")]
        + [(name, c_int64) for name in ("sample_image", "previous_image")]
        + [("means", c_double * 4), ("clip", c_double)]
        + [(name, c_int32) for name in ("sample_dtype", "previous_dtype")]
    )


class NagArguments(Structure):
    """``negengine_nag_arguments``."""

    _fields_ = (
        [(name, c_void_p) for name in ("positive", "negative", "out", "other")]
        + [(name, c_int64) for name in ("B", "T", "D")]
        + [(f"{name}_{of}", c_int64) for name in ("positive", "negative", "out", "other") for of in ("image", "token")]
        + [(name, c_double) for name in ("scale", "tau", "alpha")]
        + [(name, c_int32) for name in ("dtype", "threads")]
    )


@functools.cache
def _open() -> tuple[ctypes.CDLL | None, str | None]:
    path = FOLDER / NAME
    if not path.exists():
        failure = FOLDER / FAILURE
        reason = failure.read_text().strip() if failure.exists() else "install with a C++ compiler at hand"
        return None, f"the native library was not built, calls on CPUs run several times slower on PyTorch: {reason}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the native library does not load: {error}"
    if library.negengine_abi() != ABI:
        return None, f"{path} is of another version of negengine; install again"
    for name, result, arguments in (
        ("negengine_status_text", c_char_p, [c_int]),
        ("negengine_workspace_create", c_void_p, [c_size_t]),
        ("negengine_workspace_destroy", None, [c_void_p]),
        ("negengine_workspace_bytes", c_size_t, [c_void_p]),
        ("negengine_workspace_peak", c_size_t, [c_void_p]),
        ("negengine_workspace_release", None, [c_void_p]),
        ("negengine_workspace_use", None, [c_void_p, c_void_p]),
        ("negengine_isa", c_int, []),
        ("negengine_isa_name", c_char_p, [c_int]),
        ("negengine_set_isa", c_int, [c_int]),
        ("negengine_supports", c_int, [c_int]),
        ("negengine_precision", c_char_p, [c_int, c_int]),
        ("negengine_match", c_int, [c_void_p, POINTER(Problem), c_void_p, c_void_p]),
        ("negengine_merge", c_int, [c_void_p, POINTER(Problem), *[c_void_p] * 4, c_int64, c_int64]),
        ("negengine_negtome", c_int, [c_void_p, POINTER(Problem), POINTER(MergeArguments)]),
        ("negengine_guide", c_int, [c_void_p, POINTER(Branches), c_void_p, c_int64, c_void_p]),
        ("negengine_evidence", c_int, [c_void_p, POINTER(Branches), POINTER(Transition), c_void_p]),
        ("negengine_nag", c_int, [c_void_p, POINTER(NagArguments)]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    wanted = os.environ.get("NEGENGINE_CPU_ISA")
    if wanted is not None and library.negengine_isa_name(library.negengine_isa()).decode() != wanted:
        return None, f"NEGENGINE_CPU_ISA={wanted!r} is unknown or more than this processor has; there are {', '.join(ISAS)}"
    return library, None


def missing() -> str | None:
    """None if the library can be used, else why not."""
    return _open()[1]


def library() -> ctypes.CDLL:
    """The library; raises RuntimeError where :func:`missing` says why."""
    found, reason = _open()
    if found is None:
        raise RuntimeError(reason)
    return found


def isa() -> str:
    """Name of the instruction set in use, one of ``ISAS``."""
    return library().negengine_isa_name(library().negengine_isa()).decode()


def set_isa(name: str) -> None:
    """Use a lower instruction set (for tests and measurements); raises RuntimeError if the processor lacks it."""
    if library().negengine_set_isa(ISAS.index(name)):
        raise RuntimeError(f"this processor or build lacks {name}")


class Workspace:
    """``negengine_workspace``: memory and threads that calls share."""

    def __init__(self, limit: int, parallel: int | None = None) -> None:
        """``limit``: bytes to keep between calls. ``parallel``: address of a ``negengine_parallel`` whose threads do the work."""
        self._library = library()
        self.handle = self._library.negengine_workspace_create(limit)
        if not self.handle:
            raise MemoryError("no memory for a workspace")
        self._library.negengine_workspace_use(self.handle, parallel)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.negengine_workspace_destroy(self.handle)
            self.handle = None

    @property
    def bytes(self) -> int:
        return self._library.negengine_workspace_bytes(self.handle)

    @property
    def peak(self) -> int:
        return self._library.negengine_workspace_peak(self.handle)

    def release(self) -> None:
        self._library.negengine_workspace_release(self.handle)
