"""Calls that are laid out once and launched many times: a pipeline has a few signatures of calls, and thousands of calls.

Triton looks at each of up to 55 arguments at every launch, and a call sets aside a dozen pieces of memory. A plan knows all of that
beforehand: what is left of a call is one piece of memory and three launches with addresses.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from negengine.kernels.call import Call
from torch import Tensor
from torch.library import wrap_triton
from triton.tools.tensor_descriptor import TensorDescriptor

APART = 256  # bytes between the beginnings of pieces of workspace: more than any access needs


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        programs: blocks of the grid.
        pointers: tensors and descriptors. sizes: integers. Both in the order of the kernel's parameters, in which the constants
            are last.
    """

    kernel: Any
    programs: int
    pointers: tuple[Tensor | TensorDescriptor, ...]
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    options: dict[str, int]

    def __call__(self) -> Any:
        """Have Triton launch it: what it compiled, or None under the interpreter."""
        return self.kernel[(self.programs,)](*self.pointers, *self.sizes, **self.constants, **self.options)

    def behind(self, pointers: int) -> tuple[Any, ...]:
        """Sizes and constants, in the order of the parameters behind so many pointers."""
        names = self.kernel.arg_names[pointers + len(self.sizes) :]
        return (*self.sizes, *(self.constants[name] for name in names))

    def record(self) -> None:
        """Its record in a traced graph."""
        wrap_triton(self.kernel)[(self.programs,)](*self.pointers, *self.sizes, **self.constants, **self.options)


class Arguments(NamedTuple):
    """The tensors of a call; None: absent, or of ``bank`` and ``y`` that it is ``x``."""

    x: Tensor
    bank: Tensor | None
    references: Tensor
    y: Tensor | None
    mask: Tensor | None
    alpha: Tensor | None
    threshold: Tensor | None
    keep: Tensor | None
    stats: Tensor | None
    cosine: Tensor | None
    index: Tensor | None

    @classmethod
    def of(cls, call: Call, cosine: Tensor | None, index: Tensor | None) -> Arguments:
        x = call.x
        bank, y = (None if t is x else t for t in (call.bank, call.y))
        return cls(x, bank, call.references, y, call.mask, call.alpha, call.threshold, call.keep, call.stats, cosine, index)


class _Address:
    """What Triton's launcher takes for a tensor."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class _Form:
    """A descriptor without its tensor."""

    shape: list[int]
    strides: list[int]
    block_shape: list[int]

    def of(self, tensor: Tensor) -> TensorDescriptor:
        return TensorDescriptor(tensor, self.shape, self.strides, self.block_shape)


class _Described:
    """What Triton's launcher takes for a descriptor, which would be validated anew each time."""

    __slots__ = ("base", "shape", "strides")
    padding, round_f32_to_tf32 = "zero", False

    def __init__(self, address: int, form: _Form) -> None:
        self.base, self.shape, self.strides = _Address(address), form.shape, form.strides


class _Piece(NamedTuple):
    """A tensor of the workspace: where it begins and how long it is, in bytes."""

    start: int
    length: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.start + self.length].view(self.dtype).view(self.shape)


class Plan:
    """The launches of all calls of one signature.

    Args:
        launches: of one such call.
        given: its arguments. Every other tensor that the launches name is workspace.
    """

    def __init__(self, launches: Sequence[Launch], given: Arguments) -> None:
        slots = {id(t): number for number, t in enumerate(given) if t is not None}
        named = [tuple(_tensor_of(pointer) for pointer in launch.pointers) for launch in launches]
        self._device = given.x.device.index
        self._pieces: list[_Piece] = []
        self._bytes = 0
        for tensor in itertools.chain(*named):
            if id(tensor) not in slots:
                slots[id(tensor)] = len(given) + len(self._pieces)
                self._pieces.append(_Piece(self._bytes, tensor.nbytes, tensor.shape, tensor.dtype))
                self._bytes += triton.cdiv(tensor.nbytes, APART) * APART
        # what a launch takes is picked from the arguments, the pieces, and these descriptors of some of them, in a row
        self._described: list[tuple[int, _Form]] = []
        self._pick: list[Callable[[Sequence[Any]], tuple[Any, ...]]] = []
        for launch, tensors in zip(launches, named, strict=True):
            wanted = []
            for pointer, tensor in zip(launch.pointers, tensors, strict=True):
                wanted.append(slots[id(tensor)])
                if isinstance(pointer, TensorDescriptor):
                    wanted[-1] = len(given) + len(self._pieces) + len(self._described)
                    self._described.append((slots[id(tensor)], _Form(pointer.shape, pointer.strides, pointer.block_shape)))
            self._pick.append(operator.itemgetter(*wanted))
        self._launches = [dataclasses.replace(launch, pointers=()) for launch in launches]
        self._runners: list[tuple[Callable[..., None], tuple[Any, ...]]] | None = None

    def __call__(self, given: Arguments) -> None:
        """Launch; the device of ``given`` is the current one."""
        buffer = given.x.new_empty(self._bytes, dtype=torch.uint8)
        if self._runners is None:
            self._through_triton(given, buffer)
            return
        start = buffer.data_ptr()
        values: list[Any] = [0 if t is None else t.data_ptr() for t in given]
        values += [start + piece.start for piece in self._pieces]
        values += [_Described(values[slot], form) for slot, form in self._described]
        stream = triton.runtime.driver.active.get_current_stream(self._device)
        for pick, (run, rest) in zip(self._pick, self._runners, strict=True):
            run(*pick(values), *rest, stream=stream)

    def _through_triton(self, given: Arguments, buffer: Tensor) -> None:
        """The first time, which compiles; under the interpreter, which compiles nothing, every time."""
        values: list[Any] = [*given, *(piece.of(buffer) for piece in self._pieces)]
        values += [form.of(values[slot]) for slot, form in self._described]
        compiled = []
        for launch, pick in zip(self._launches, self._pick, strict=True):
            pointers = pick(values)
            compiled.append((dataclasses.replace(launch, pointers=pointers)(), launch, len(pointers)))
        if all(isinstance(kernel, triton.compiler.CompiledKernel) for kernel, *_ in compiled):
            self._runners = [(kernel[(launch.programs, 1, 1)], launch.behind(count)) for kernel, launch, count in compiled]


def _tensor_of(pointer: Tensor | TensorDescriptor) -> Tensor:
    tensor: Tensor = pointer.base if isinstance(pointer, TensorDescriptor) else pointer
    return tensor
