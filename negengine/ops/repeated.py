"""Calls like an earlier one: it was checked, and its backend chosen. A pipeline makes thousands of calls of a few kinds.

Where the host can read a table, what is in it is a part of what makes calls alike: it was compared with what was said about it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from negengine.kernels.call import Call
from negengine.ops import registry, triton, verdicts

Run = Callable[[Call], None]
MOST = 256
SETTINGS = (verdicts.VARIABLE, "NEGENGINE_TUNE")  # of the environment, which decide what is launched
_known: dict[tuple[Any, ...], Run] = {}


def applies(x: Tensor) -> bool:
    """Whether a call with this tensor is only computed: not traced, differentiated, profiled or seen by a dispatch mode."""
    return (
        (x.is_cuda or (x.is_cpu and not _interpreted()))
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
    )


@functools.cache
def _interpreted() -> bool:
    """Whether the CPU stands in for a GPU: what Triton's backend binds for a kind of calls asks for the current one."""
    return triton._interpreted()


def run(call: Call, backend: str | None, settle: Callable[[Call, str | None], Run]) -> None:
    """Run a call.

    Args:
        settle: what the first of calls alike is given to: checks it, and returns what runs it and those alike.
    """
    try:
        signature = call.signature()
    except AttributeError:  # of what is no tensor
        settle(call, backend)
        raise
    key = (registry.state(), verdicts.view(), *map(os.environ.get, SETTINGS), backend, _entries(call), *signature)
    known = _known.get(key)
    if known is None:
        known = settle(call, backend)
        if len(_known) >= MOST:
            _known.clear()
        _known[key] = known
    known(call)


def _entries(call: Call) -> tuple[tuple[int, ...], ...] | None:
    """Those of a table on the CPU, if something was said about them."""
    if call.references.is_cpu and (call.disjoint or call.table):
        return tuple(map(tuple, call.references.tolist()))
    return None
