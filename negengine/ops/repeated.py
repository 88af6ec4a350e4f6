"""Calls like an earlier one: it was checked, and its backend chosen. A pipeline makes thousands of calls of a few kinds.

Only where the host has nothing to read: a table on the CPU is compared with what was said about it at every call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from negengine.kernels.call import Call
from negengine.ops import registry, verdicts

Run = Callable[[Call], None]
MOST = 256
SETTINGS = (verdicts.VARIABLE, "NEGENGINE_TUNE")  # of the environment, which decide what is launched
_known: dict[tuple[Any, ...], Run] = {}


def applies(x: Tensor) -> bool:
    """Whether a call with this tensor is only computed: not traced, differentiated, profiled or seen by a dispatch mode."""
    return (
        x.is_cuda
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.autograd._profiler_enabled()
    )


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
    key = (registry.state(), verdicts.view(), *map(os.environ.get, SETTINGS), backend, *signature)
    known = _known.get(key)
    if known is None:
        known = settle(call, backend)
        if len(_known) >= MOST:
            _known.clear()
        _known[key] = known
    known(call)
