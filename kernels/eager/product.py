"""The one product that the 16-bit search is made of, where a library has it."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor], None]
"""``(a [G, T, D], b [G, D, M], out [G, T, M]) -> None``: 16-bit factors, float32 sums and results."""

DTYPES = (torch.float16, torch.bfloat16)
OLDEST = (8, 0)  # compute capability; before it, matrix units have no bfloat16


def batched(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.bmm(a, b, out_dtype=torch.float32, out=out)


@functools.cache
def widening(device_type: str, dtype: torch.dtype) -> Product | None:
    """The product for tensors of this kind, decided once per process; None where the search must be made in float32.

    PyTorch has it for 16-bit tensors on CUDA. ROCm goes the float32 way: matrix units of some AMD devices flush subnormal 16-bit
    factors, which rows of float16 below 6e-5 consist of.
    """
    there = "dtype_out" in torch.ops.aten.bmm.overloads() and device_type == "cuda" and torch.version.hip is None
    if not there or dtype not in DTYPES or (torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST):
        return None
    return batched


class _Precision:
    """PyTorch's settings of how products are formed; of several threads the first changes them and the last puts them back."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.before: tuple[str, str, bool] = ("none", "none", False)

    def strict(self) -> None:
        cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        with self.lock:
            if self.inside == 0:
                self.before = cuda.fp32_precision, cpu.fp32_precision, cuda.allow_fp16_accumulation
                cuda.fp32_precision = cpu.fp32_precision = "ieee"
                cuda.allow_fp16_accumulation = False
            self.inside += 1

    def as_before(self) -> None:
        cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                cuda.fp32_precision, cpu.fp32_precision, cuda.allow_fp16_accumulation = self.before


_precision = _Precision()


@contextlib.contextmanager
def as_written(device: torch.device) -> Iterator[None]:
    """Products in the dtype of their operands, sums in float32: no autocast, no TF32, no bfloat16 or float16 in place of it."""
    casts = torch.amp.is_autocast_available(device.type)
    _precision.strict()
    try:
        with torch.autocast(device.type, enabled=False) if casts else contextlib.nullcontext():
            yield
    finally:
        _precision.as_before()
