"""The ``torch`` backend: exact search through library matrix products, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from negengine.kernels.call import Call
from negengine.kernels.eager import match as match_kernel
from negengine.kernels.eager import merge as merge_kernel
from negengine.ops.registry import Backend, register_backend


def _compute(dtype: torch.dtype) -> torch.dtype:
    # torch's 16-bit matrix products round the similarity itself, which picks a wrong row in 1 to 5 % of cases
    return torch.promote_types(dtype, torch.float32)


def _match(call: Call) -> tuple[Tensor, Tensor]:
    entries = call.entries()
    if entries and (last := max(entries)) >= len(call.bank):
        raise ValueError(f"references names image {last} of a bank of {len(call.bank)}")
    compute = _compute(call.x.dtype)
    return match_kernel.match(call.x, call.bank, call.references, call.mask, call.matching, compute)


def _run(call: Call) -> None:
    cosine, index = _match(call)
    gate = (index >= 0) & (cosine > call.threshold.to(cosine.dtype))
    if call.keep is not None:
        gate &= call.keep
    if call.stats is not None:
        eligible = (call.references >= 0).any(1).sum() * call.x.shape[1]
        call.stats.add_(torch.stack([gate.sum(), eligible, torch.ones_like(eligible)]))
    compute = _compute(call.x.dtype)
    call.y.copy_(merge_kernel.merge(call.x, call.bank, call.references, index, gate, call.alpha, compute))


def _refuses(device: torch.device, dtype: torch.dtype, search: str) -> str | None:
    return None if search in ("auto", "exact") else f"searches exactly, has no search={search!r}"


register_backend(Backend("torch", missing=lambda: None, refuses=_refuses, match=_match, run=_run))
