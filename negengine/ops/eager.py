"""The ``torch`` backend: exact search through library matrix products, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from negengine.kernels.eager import match as match_kernel
from negengine.kernels.eager import merge as merge_kernel
from negengine.ops.registry import Backend, register_backend


def _compute(dtype: torch.dtype) -> torch.dtype:
    # torch's 16-bit matrix products round the similarity itself, which picks a wrong row in 1 to 5 % of cases
    return torch.promote_types(dtype, torch.float32)


def _match(x: Tensor, bank: Tensor, references: Tensor, mask: Tensor | None, matching: str, search: str) -> tuple[Tensor, Tensor]:
    # elsewhere the host must not read the table
    if references.device.type == "cpu" and references.numel() and (last := int(references.max())) >= len(bank):
        raise ValueError(f"references names image {last} of a bank of {len(bank)}")
    return match_kernel.match(x, bank, references, mask, matching, _compute(x.dtype))


def _merge(x: Tensor, bank: Tensor, references: Tensor, index: Tensor, gate: Tensor, alpha: Tensor) -> Tensor:
    return merge_kernel.merge(x, bank, references, index, gate, alpha, _compute(x.dtype))


def _refuses(device: torch.device, dtype: torch.dtype, search: str) -> str | None:
    return None if search in ("auto", "exact") else f"searches exactly, has no search={search!r}"


register_backend(Backend("torch", missing=lambda: None, refuses=_refuses, match=_match, merge=_merge))
