"""Launches that find a kernel's variant by what distinguishes variants, not by a look at every argument."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

ALIGNED = 16  # bytes: addresses that Triton compiles another variant for
INT32 = 2**31


def variant_key(x: Tensor, specialized: list[Tensor], constants: dict[str, Any], options: dict[str, int]) -> tuple[Any, ...]:
    """What decides which variant a launch takes.

    Args:
        specialized: the pointers of whose alignment there are variants.
    """
    aligned = [p.data_ptr() % ALIGNED == 0 for p in specialized]
    return (x.device.index, x.dtype, *aligned, *constants.values(), *options.values())


class Prepared:
    """A kernel whose variants are told apart by constants, dtype and the alignment of tensors, and nothing else.

    Triton inspects each argument at every launch. Sizes are of no variant here as long as 32 bits hold them, and the
    dtypes of small tensors follow from the constants. Triton's debug settings and hooks count when a variant is first launched.

    Args:
        kernel: launched by Triton itself where a variant is new, where no variants exist (under the interpreter), for sizes beyond
            32 bits, and on AMD GPUs, where a variant also depends on how much memory is behind each tensor.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        params = getattr(kernel, "params", ())  # the interpreter's kernels have none
        regardless = [p.is_constexpr or p.do_not_specialize or p.do_not_specialize_on_alignment for p in params]
        self._specialized = [number for number, free in enumerate(regardless) if not free]
        self._variants: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def launch(
        self,
        programs: int,
        x: Tensor,
        pointers: tuple[Tensor, ...],
        sizes: tuple[float, ...],
        constants: dict[str, Any],
        **options: int,
    ) -> None:
        """One launch of ``programs`` blocks.

        Args:
            x: of whose dtype, and on whose device, the call is.
            pointers: tensors. sizes: numbers. Both in the order of the kernel's parameters, in which the constants are last.
        """
        key = variant_key(x, [pointers[number] for number in self._specialized], constants, options)
        variant = self._variants.get(key)
        narrow = max(sizes) < INT32 and torch.version.hip is None
        if variant is None or not narrow:
            compiled = self.kernel[(programs,)](*pointers, *sizes, **constants, **options)
            if narrow and isinstance(compiled, triton.compiler.CompiledKernel):
                names = self.kernel.arg_names[len(pointers) + len(sizes) :]
                self._variants[key] = compiled, tuple(constants[name] for name in names)
            return
        compiled, values = variant
        addresses = (p.data_ptr() for p in pointers)  # of a tensor, the launcher would ask the driver
        stream = triton.runtime.driver.active.get_current_stream(x.device.index)
        compiled[(programs, 1, 1)](*addresses, *sizes, *values, stream=stream)
