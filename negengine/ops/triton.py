"""The ``triton`` backend: fused kernels on GPUs; under Triton's interpreter, on CPU tensors too."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from negengine.kernels.call import Call
from negengine.kernels.guidance import Evidence, Guide, Nag
from negengine.ops import guidance_check, verdicts
from negengine.ops.registry import Backend, Guidance, register_backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (8, 0)  # compute capability
_HERE = contextlib.nullcontext()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return "needs a GPU, and torch finds none"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return None if torch.version.hip else torch.cuda.get_device_capability(device)


def _refuses(device: torch.device, dtype: torch.dtype, search: str) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"runs on GPUs, not on {device.type}"
    if dtype not in DTYPES:
        return f"takes float16, bfloat16 and float32, not {dtype}"
    capability = _capability(device) if device.type == "cuda" else None
    if capability is not None and capability < OLDEST:
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]}, {device} has {capability[0]}.{capability[1]}"
    if search in ("auto", "exact"):
        return None
    from negengine.kernels.triton import launch

    architecture = launch.architecture(device)
    if search not in architecture.searches:
        return f"has no search={search!r} on {architecture.name}, only {', '.join(map(repr, architecture.searches))}"
    return None


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the device of real tensors the current one."""
    from negengine.kernels.triton import launch

    if not x.is_cuda or launch.traced(x) or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def _match(call: Call) -> tuple[Tensor, Tensor]:
    from negengine.kernels.triton import launch

    verdicts.warn_if_wrong(call)
    with _on(call.x):
        return launch.match(call)


def _run(call: Call) -> None:
    from negengine.kernels.triton import launch

    verdicts.warn_if_wrong(call)
    with _on(call.x):
        launch.negtome(call)


def _bound(call: Call) -> Callable[[Call], None]:
    from negengine.kernels.triton import launch

    verdicts.warn_if_wrong(call)
    with _on(call.x):
        run, device = launch.bound(call), call.x.device

    def there(call: Call) -> None:
        with torch.cuda.device(device):
            run(call)

    return lambda call: (run if device.index == torch.cuda.current_device() else there)(call)


# --- what a compiled graph shows: the same launches, recorded ----------------------------------------------------


def _recorded(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers an operator whose launches a compiled graph shows, while an exported program keeps the operator.

    ``torch.library.triton_op`` does the same, but reads the source for kernels. It finds none behind the imports above, and to look
    it imports the compiler: 1.8 s of the 2.1 s that ``import negengine.ops`` took.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        operator = torch.library.custom_op(name, function, mutates_args=mutates_args)
        operator.register_fake(function)

        def rule(mode, op, types, args, kwargs):  # type: ignore[no-untyped-def]
            from torch.export._trace import custom_triton_ops_decomposition_disabled

            if custom_triton_ops_decomposition_disabled():
                return mode.__torch_dispatch__(op, types, args, kwargs)
            with mode:
                return function(*args, **kwargs)

        operator.register_torch_dispatch(FunctionalTensorMode, rule)
        return operator

    return register


@_recorded("negengine::triton_match")
def _traced_match(
    x: Tensor,
    bank: Tensor | None,
    references: Tensor,
    mask: Tensor | None,
    matching: str,
    search: str,
    table: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    return _match(Call(x, x if bank is None else bank, references, mask, matching, search, table=table))


@_recorded("negengine::triton_negtome")
def _traced_negtome(
    x: Tensor,
    bank: Tensor | None,
    references: Tensor,
    alpha: Tensor,
    threshold: Tensor,
    keep: Tensor | None,
    mask: Tensor | None,
    matching: str,
    search: str,
    table: Sequence[int] | None = None,
) -> Tensor:
    y = x.new_empty(x.shape)
    bank = x if bank is None else bank
    _run(Call(x, bank, references, mask, matching, search, y, alpha, threshold, keep, table=table))
    return y


@_recorded("negengine::triton_negtome_", mutates_args=("x", "stats"))
def _traced_negtome_(
    x: Tensor,
    bank: Tensor | None,
    references: Tensor,
    alpha: Tensor,
    threshold: Tensor,
    keep: Tensor | None,
    stats: Tensor | None,
    mask: Tensor | None,
    matching: str,
    search: str,
    disjoint: bool = False,
    table: Sequence[int] | None = None,
) -> None:
    bank = x if bank is None else bank
    _run(Call(x, bank, references, mask, matching, search, x, alpha, threshold, keep, stats, disjoint, table))


# --- guidance: whole in a compiled graph -------------------------------------------------------------------------


def _guide(call: Guide) -> None:
    from negengine.kernels.triton import guidance_launch

    with _on(call.out):
        guidance_launch.guide(call)


def _evidence(call: Evidence) -> Tensor:
    from negengine.kernels.triton import guidance_launch

    with _on(call.sample):
        return guidance_launch.evidence(call)


def _nag(call: Nag) -> None:
    from negengine.kernels.triton import guidance_launch

    with _on(call.out):
        guidance_launch.nag(call)


_GUIDANCE = Guidance(lambda device, dtype: _refuses(device, dtype, "exact"), _guide, _evidence, _nag, guidance_check.defers)

register_backend(
    Backend(
        "triton",
        missing=_missing,
        refuses=_refuses,
        match=_match,
        run=_run,
        bound=_bound,
        defers=verdicts.defers,
        fingerprint=verdicts.fingerprint,
        # the interpreter runs kernels, it cannot record them
        traced={} if _interpreted() else {"match": _traced_match, "negtome": _traced_negtome, "negtome_": _traced_negtome_},
        guidance=_GUIDANCE,
    )
)
