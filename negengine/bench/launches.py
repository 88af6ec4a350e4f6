"""What a call launches on a GPU that is not here: its kernels, compiled, with their grids and arguments."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from negengine import reference
from negengine.bench import sass
from negengine.bench.shapes import Shape


@dataclass(frozen=True)
class Launch:
    """One kernel of a call.

    Attributes:
        name: of the kernel's function.
        programs: blocks of the grid.
        warps, registers, shared: of a block, a thread, a block in bytes.
        values: the arguments that are numbers, constants among them.
    """

    name: str
    programs: int
    warps: int
    registers: int
    shared: int
    values: dict[str, int]
    cubin: bytes = field(repr=False)


class _Device:
    """Enough of a driver for Triton to compile for a device, and nothing to launch with."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.architecture = architecture
        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return self.architecture  # a kernel keeps what it compiled under this

    def get_current_stream(self, device: str) -> int:
        return 0


def recorded(shape: Shape, dtype: torch.dtype, architecture: str, matching: str = "paper", search: str = "exact") -> list[Launch]:
    """The launches of one call in place, the first image of the group being the reference of the others.

    Args:
        architecture: of ``tuning.ARCHITECTURES``, of NVIDIA.

    Raises:
        RuntimeError: under Triton's interpreter, which compiles nothing.
    """
    from negengine.kernels.call import Call
    from negengine.kernels.triton import launch, rows, tuning

    if rows.INTERPRETED.value:
        raise RuntimeError("TRITON_INTERPRET is set, so nothing is compiled; unset it to predict")
    found: list[Launch] = []
    # tensors without memory: only sizes, strides and alignment decide what is launched
    x = torch.empty(shape.images, shape.tokens, shape.channels, dtype=dtype, device="meta")
    references = reference.group_references("first", shape.images, shape.images)
    call = Call(
        x=x,
        bank=x,
        references=torch.empty_like(references, device="meta"),
        mask=None,
        matching=matching,
        search=search,
        y=x,
        alpha=torch.empty(shape.images, dtype=torch.float64, device="meta"),
        threshold=torch.empty(1, dtype=torch.float64, device="meta"),
        stats=torch.empty(3, dtype=torch.int64, device="meta"),
        disjoint=True,
        table=references.flatten().tolist(),
    )
    device = tuning.ARCHITECTURES[architecture]
    with _recording(architecture, found), mock.patch.object(launch, "architecture", return_value=device):
        launch.negtome(call)
    return found


def recorded_guidance(operator: str, shape: tuple[int, ...], dtype: torch.dtype, architecture: str) -> Launch:
    """The launch of one call of guidance: ``"guide"`` and ``"evidence"`` with classifier-free guidance, ``"nag"``.

    Args:
        shape: ``[n, ...]`` of the predictions, ``[B, T, D]`` of the attention outputs.

    Raises:
        RuntimeError: under Triton's interpreter, which compiles nothing.
    """
    from negengine.kernels import guidance as calls
    from negengine.kernels.triton import guidance_launch, rows

    if rows.INTERPRETED.value:
        raise RuntimeError("TRITON_INTERPRET is set, so nothing is compiled; unset it to predict")
    found: list[Launch] = []
    n, x = shape[0], torch.empty(shape, dtype=dtype, device="meta")
    one, many, means = (torch.empty(size, dtype=torch.float64, device="meta") for size in (1, n, 4))
    with _recording(architecture, found):
        if operator == "nag":
            guidance_launch.nag(calls.Nag(x, x, 5.0, 2.5, 0.25, x, None))
        else:
            x = x.flatten(1)
            branches = calls.Branches(x, x, x, one, False)
            if operator == "guide":
                guidance_launch.guide(calls.Guide(branches, many, 2, x.new_empty(2 * n, x.shape[1])))
            else:
                guidance_launch.evidence(calls.Evidence(branches, x, x, means, 1.0))
    return found[0]


@contextlib.contextmanager
def _recording(architecture: str, found: list[Launch]) -> Iterator[None]:
    import triton

    run = triton.JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        numbers = {name: int(value) for name, value in values.items() if isinstance(value, int)}
        meta, read = compiled.metadata, compiled
        if kernel.__name__ == "merge_kernel" and kwargs["CAREFUL"]:
            # ordinary rows skip what searches again for extreme ones, which straight-line reading would count as if it ran
            read = run(kernel, *args, grid=grid, warmup=True, **kwargs | {"CAREFUL": False})
        cubin, registers = read.asm["cubin"], sass.registers(compiled.asm["cubin"])
        found.append(Launch(kernel.__name__, math.prod(grid), meta.num_warps, registers, meta.shared, numbers, cubin))

    active = triton.runtime.driver._active
    try:
        triton.runtime.driver.set_active(_Device(architecture))
        with mock.patch.object(triton.JITFunction, "run", compile_only):
            yield
    finally:
        triton.runtime.driver._active = active
