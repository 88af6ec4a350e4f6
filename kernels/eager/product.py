"""The one product that the 16-bit search is made of, where a library has it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor], None]
"""``(a [G, T, D], b [G, D, M], out [G, T, M]) -> None``: 16-bit factors, float32 sums and results."""

DTYPES = (torch.float16, torch.bfloat16)


def batched(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.bmm(a, b, out_dtype=torch.float32, out=out)


@functools.cache
def widening(device_type: str, dtype: torch.dtype) -> Product | None:
    """The product for tensors of this kind, decided once per process; None where the search must be made in float32.

    PyTorch has it for 16-bit tensors on CUDA. ROCm goes the float32 way: matrix units of some AMD devices flush subnormal 16-bit
    factors, which rows of float16 below 6e-5 consist of.
    """
    there = "dtype_out" in torch.ops.aten.bmm.overloads()
    return batched if there and device_type == "cuda" and dtype in DTYPES and torch.version.hip is None else None


@contextlib.contextmanager
def as_written(device: torch.device) -> Iterator[None]:
    """Products in the dtype of their operands, sums in float32: no autocast, no TF32, no bfloat16 or float16 in place of it."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    narrow = torch.backends.cuda.matmul.allow_fp16_accumulation
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
        casts = torch.amp.is_autocast_available(device.type)
        with torch.autocast(device.type, enabled=False) if casts else contextlib.nullcontext():
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
        torch.backends.cuda.matmul.allow_fp16_accumulation = narrow
