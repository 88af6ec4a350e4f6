"""The ``torch`` backend: exact search through library matrix products, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from negengine.kernels.call import Call
from negengine.kernels.eager import guidance, half, match, merge, product
from negengine.ops.registry import Backend, Guidance, register_backend


def _compute(dtype: torch.dtype) -> torch.dtype:
    # torch's 16-bit matrix products round the similarity itself, which picks a wrong row in 1 to 5 % of cases
    return torch.promote_types(dtype, torch.float32)


def _check(call: Call) -> None:
    entries = call.entries()
    if entries and (last := max(entries)) >= len(call.bank):
        raise ValueError(f"references names image {last} of a bank of {len(call.bank)}")


def _match(call: Call) -> tuple[Tensor, Tensor]:
    _check(call)
    wide = product.widening(call.x.device.type, call.x.dtype)
    if wide is None or not call.x.shape[:2].numel():
        return match.match(call, _compute(call.x.dtype))
    with product.as_written(call.x.device):
        return half.match(call, wide)


def _run(call: Call) -> None:
    """On a CPU whole tensors are merged at once, which takes it least time; elsewhere chunks, of a bounded size."""
    x, wide = call.x, product.widening(call.x.device.type, call.x.dtype)
    if x.device.type == "cpu" and wide is None:
        cosine, index = _match(call)
        return merge.whole(call, cosine, index)
    _check(call)
    with product.as_written(x.device):
        if wide is None or not x.numel():
            cosine, index = _match(call)
        else:
            cosine, index = (x.new_empty(x.shape[:2], dtype=dtype) for dtype in (torch.float32, torch.int64))
            half.search(call, wide, cosine, index)
        merge.push(call, cosine, index)


def _refuses(device: torch.device, dtype: torch.dtype, search: str) -> str | None:
    return None if search in ("auto", "exact") else f"searches exactly, has no search={search!r}"


_GUIDANCE = Guidance(lambda device, dtype: None, guidance.guide, guidance.evidence, guidance.nag)

register_backend(Backend("torch", missing=lambda: None, refuses=_refuses, match=_match, run=_run, guidance=_GUIDANCE))
