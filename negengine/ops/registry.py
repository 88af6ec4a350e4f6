"""Which backends exist, which can run a call, and why the others cannot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from negengine.kernels.call import Call
from negengine.kernels.guidance import Evidence, Guide, Nag

SEARCHES = ("auto", "exact", "bf16", "int8", "fp8")


def never(call: Call) -> None:
    """What ``defers`` of a backend that should be chosen wherever it can run."""


@dataclass(frozen=True)
class Guidance:
    """A backend's operators on predictions and attention outputs.

    Attributes:
        refuses: ``(device, dtype) ->`` None if it takes tensors of that dtype there, else why not.
        guide, nag: write ``call.out`` and, of the latter, ``call.other``.
        evidence: float64 ``[3, n]``.
        defers: None if this backend should be chosen by itself on such a device, else why the next one should be.
    """

    refuses: Callable[[torch.device, torch.dtype], str | None]
    guide: Callable[[Guide], None]
    evidence: Callable[[Evidence], Tensor]
    nag: Callable[[Nag], None]
    defers: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None


@dataclass(frozen=True)
class Backend:
    """One implementation of the search and the merge, and of guidance where it has that.

    Attributes:
        name: what users pass as ``backend=``.
        missing: returns None if the backend can run on this machine, else why it cannot.
        refuses: ``(device, dtype, search) ->`` None if it takes such a call, else why not.
        match: searches only; returns cosine ``[B, T]`` and index int32 ``[B, T]``.
        run: the whole call; writes ``call.y`` and adds to ``call.stats``.
        bound: what ``run`` comes to for calls with the signature of this one, where something can be prepared for them.
        defers: None if this backend should be chosen by itself for the call, else why the next one that can run it should be.
        fingerprint: of the sources that ``traced`` opens into.
        traced: name of an operator -> what a compiled graph shows in its place, by the same arguments but ``backend``; operators
            that are not here stay as they are, opaque.
        guidance: its other operators, None if it has none.
    """

    name: str
    missing: Callable[[], str | None]
    refuses: Callable[[torch.device, torch.dtype, str], str | None]
    match: Callable[[Call], tuple[Tensor, Tensor]]
    run: Callable[[Call], None]
    bound: Callable[[Call], Callable[[Call], None]] | None = None
    defers: Callable[[Call], str | None] = never
    fingerprint: Callable[[], str] = lambda: ""
    traced: Mapping[str, Callable[..., object]] = field(default_factory=dict)
    guidance: Guidance | None = None


_BACKENDS: dict[str, Backend] = {}  # in order of preference
_changes = itertools.count(1)
_state = 0


def changed() -> None:
    """Say that a call may get another backend than before."""
    global _state
    _state = next(_changes)


def state() -> int:
    """As long as it is the same, calls alike get the same backend."""
    return _state


def register_backend(backend: Backend) -> None:
    """Add a backend; those registered first are preferred."""
    if backend.name in _BACKENDS:
        raise ValueError(f"backend {backend.name!r} is registered already")
    _BACKENDS[backend.name] = backend
    changed()


@contextmanager
def registered(backend: Backend) -> Iterator[Backend]:
    """As :func:`register_backend`, for the duration of a ``with``."""
    register_backend(backend)
    try:
        yield backend
    finally:
        del _BACKENDS[backend.name]
        changed()


def backends() -> dict[str, str | None]:
    """Name of every backend -> None if it can be used on this machine, else the reason why not."""
    return {name: backend.missing() for name, backend in _BACKENDS.items()}


def known(name: str) -> str:
    """``name`` if there is such a backend; raises ValueError naming those there are."""
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(_BACKENDS)}")
    return name


def choose(name: str | None, device: torch.device, dtype: torch.dtype, search: str, call: Call | None = None) -> Backend:
    """The backend for a call: the named one, or the first that can take it and does not defer.

    Without a name, where all that can take the call defer, the first of them; without a ``call`` nobody is asked to defer.

    Raises:
        ValueError: unknown name or search.
        RuntimeError: the named backend, or every backend, cannot run this call; says why.
    """
    backend, reasons = find(name, device, dtype, search, call)
    if backend is None:
        raise RuntimeError(f"no backend for {dtype} on {device} with search={search!r} ({'; '.join(reasons)})")
    return backend


def find(
    name: str | None, device: torch.device, dtype: torch.dtype, search: str, call: Call | None = None
) -> tuple[Backend | None, list[str]]:
    """As :func:`choose`, but None where none can, and why those that were asked cannot."""
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {SEARCHES}, got {search!r}")
    reasons: list[str] = []
    deferring = None
    for backend in _BACKENDS.values() if name is None else (_BACKENDS[known(name)],):
        reason = backend.missing() or backend.refuses(device, dtype, search)
        if reason is not None:
            reasons.append(f"{backend.name}: {reason}")
        elif name is not None or call is None or backend.defers(call) is None:
            return backend, reasons
        else:
            deferring = deferring or backend
    return deferring, reasons


def choose_guidance(name: str | None, device: torch.device, *dtypes: torch.dtype) -> Guidance:
    """The operators of the named backend, or of the first that takes such tensors and does not defer.

    Without a name, where all that can take the call defer, the first of them.

    Raises:
        ValueError: unknown name.
        RuntimeError: the named backend, or every backend, cannot run this call; says why.
    """
    reasons: list[str] = []
    deferring = None
    for backend in _BACKENDS.values() if name is None else (_BACKENDS[known(name)],):
        found = backend.guidance
        if found is None:
            reasons.append(f"{backend.name}: has no operators of guidance")
            continue
        refusals = (found.refuses(device, dtype) for dtype in dict.fromkeys(dtypes))
        reason = backend.missing() or next((refusal for refusal in refusals if refusal is not None), None)
        if reason is not None:
            reasons.append(f"{backend.name}: {reason}")
        elif name is not None or found.defers(device, dtypes[0]) is None:
            return found
        else:
            deferring = deferring or found
    if deferring is None:
        raise RuntimeError(f"no backend for guidance in {', '.join(map(str, dtypes))} on {device} ({'; '.join(reasons)})")
    return deferring
