"""The rows of a denoiser's batch: those that the pipeline passes, then those that effects join to them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from negengine.diffusers.families import Conditioning

TEXT = "encoder_hidden_states"  # a denoiser's input that holds the text tokens, and that of its cross-attentions


class Owners:
    """Numbers of rows, known on the host and on a device, so that neither waits for the other when it takes rows of a tensor."""

    def __init__(self, rows: Sequence[int], device: torch.device) -> None:
        self._host = torch.tensor(rows, dtype=torch.int64)
        self._there = self._host.to(device)

    def __len__(self) -> int:
        return len(self._host)

    def of(self, value: Tensor) -> Tensor:
        return value[self._host if value.device.type == "cpu" else self._there]


@dataclass(frozen=True)
class Join:
    """Rows that an effect wants beside those of the pipeline.

    Attributes:
        owner: numbers of k rows, or a slice of as many: of which row each new row takes the inputs.
        own: inputs by name (a name with dots leads into a container) that the new rows have of their own, ``[k, ...]``.
    """

    owner: Owners | slice
    own: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.owner.stop - self.owner.start if isinstance(self.owner, slice) else len(self.owner)

    def taken(self, value: Tensor) -> Tensor:
        """The owners' rows of an input."""
        return value[self.owner] if isinstance(self.owner, slice) else self.owner.of(value)


def length(name: str) -> Any:
    """An attribute that holds a number as the length of an empty tensor, as compiled code wants it: see :class:`Here`."""

    def get(holder: Any) -> int:
        return len(getattr(holder, name))

    def put(holder: Any, number: int) -> None:
        setattr(holder, name, torch.empty(number, 0, device="cpu"))

    return property(get, put)


class Rows:
    """How many rows of the current call are the pipeline's, and in which order they stand.

    Attention processors may divide the batch into equal parts (perturbed attention guidance: by branches). Then the joined rows
    stand in the part of the rows that own them, behind the pipeline's, while they are in the denoiser.

    Attributes:
        base: rows that the pipeline passed.
        drawn: with the branches that a method joined: each draws an image of the call, under some prompt.
        total: with all that were joined.
        parts: equal parts of the pipeline's rows; joined rows belong to each equally, in their order.
    """

    base, drawn, total = length("_base"), length("_drawn"), length("_total")

    def __init__(self) -> None:
        self.base = self.drawn = self.total = 0
        self.parts = 1

    @property
    def divided(self) -> bool:
        """Whether rows are in another order in the denoiser than outside it."""
        return self.parts > 1 and self.total > self.base

    def divide(self, x: Tensor) -> Tensor:
        """The pipeline's rows, then the joined ones -> part by part."""
        own, joined = (rows.unflatten(0, (self.parts, -1)) for rows in x.split([self._own(x), len(x) - self._own(x)]))
        return torch.cat([own, joined], 1).flatten(0, 1)

    def collect(self, x: Tensor) -> Tensor:
        """What :meth:`divide` was given."""
        parts = x.unflatten(0, (self.parts, -1))
        own, joined = parts.split([self._own(x) // self.parts, (len(x) - self._own(x)) // self.parts], 1)
        return torch.cat([own.flatten(0, 1), joined.flatten(0, 1)])

    def _own(self, x: Tensor) -> int:
        """Rows of ``x`` that are the pipeline's; where attention works within windows, each image has several."""
        return len(x) * self.base // self.total


@dataclass(frozen=True)
class Halves:
    """Which of the pipeline's rows are conditional, and which are not; None where it passes no such rows."""

    conditional: slice
    unconditional: slice | None


def halves(base: int, images: int, title: str, conditioning: Conditioning) -> Halves:
    """Of ``base`` rows for so many images. Raises ValueError: one cannot tell which are conditional."""
    if base != images and (base != 2 * images or conditioning.cfg != "halves"):
        raise ValueError(
            f"the denoiser is called with {base} rows for {images} images; {title} knows one row per image, or two with "
            "classifier-free guidance, and cannot tell which of these are conditional"
        )
    parts = slice(0, images), slice(images, base)
    if base == images:
        return Halves(parts[0], None)
    return Halves(*parts) if conditioning.conditional_first else Halves(*parts[::-1])


class Here(threading.local):
    """What the denoiser's call that is running on this thread has for its blocks, whose sizes may change from call to call.

    Torch makes compiled code anew for every value of a number that it reads from an object, and for every size of a tensor to
    which a layer leads, as it does through its hooks. The sizes of tensors that it finds here may change.
    """

    def __init__(self) -> None:
        """On each thread. Defaults in the class would hide what is set here from torch 2.11's compiler."""
        self.rows: Rows = Rows()
        self.running: Any = None  # whose call it is (a RunningCall); None: that of a pipeline without methods
        self.plan: Any = None  # of the effect that changes tokens by one


here = Here()


def join(inputs: Mapping[str, Any], wanted: Join, conditioning: Conditioning, rows: int) -> dict[str, Any]:
    """The denoiser's inputs with rows added to every input that has ``rows`` of them."""
    if conditioning.mask is not None:
        inputs, own = of_one_length([inputs, wanted.own], conditioning.mask)
        wanted = _over_images(Join(wanted.owner, own), inputs, conditioning.mask)
    return _in_rows(inputs, conditioning, lambda value, name: with_rows(value, rows, wanted, name))


def divide(inputs: Mapping[str, Any], conditioning: Conditioning, rows: Rows) -> dict[str, Any]:
    """The denoiser's inputs in the order that :meth:`Rows.divide` gives."""

    def divided(x: Tensor, name: str) -> Tensor:
        return rows.divide(x) if x.ndim and len(x) == rows.total else x

    return _in_rows(inputs, conditioning, lambda value, name: _each_tensor(value, name, divided))


def _in_rows(inputs: Mapping[str, Any], conditioning: Conditioning, change: Callable[[Any, str], Any]) -> dict[str, Any]:
    """``inputs`` with those changed that have a row per image."""
    names = [name for name in (conditioning.sample, *conditioning.batched) if name in inputs]
    return dict(inputs) | {name: change(inputs[name], name) for name in names}


def of_one_length(parts: Sequence[Mapping[str, Any]], mask: str) -> list[dict[str, Any]]:
    """Inputs with their texts filled up to the longest of them, and masked; as they are if none is filled up or masked.

    Args:
        parts: inputs by name; those without a text stay as they are. mask: name of the input that masks text tokens.
    """
    lengths = {part[TEXT].shape[1] for part in parts if TEXT in part}
    if len(lengths) == 1 and all(part.get(mask) is None for part in parts):
        return [dict(part) for part in parts]
    return [_filled(part, max(lengths), mask) if TEXT in part else dict(part) for part in parts]


def _over_images(wanted: Join, inputs: Mapping[str, Any], mask: str) -> Join:
    """Rows whose mask goes on over the image tokens, which are seen, where that of ``inputs`` does."""
    if mask not in wanted.own:
        return wanted
    own = wanted.own[mask]
    missing = inputs[mask].shape[1] - own.shape[1]
    return Join(wanted.owner, {**wanted.own, mask: torch.nn.functional.pad(own, (0, missing), value=1)})


def _filled(part: Mapping[str, Any], length: int, mask: str) -> dict[str, Any]:
    text, valid = part[TEXT], part.get(mask)
    if valid is None:
        valid = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    missing = length - text.shape[1]
    pad = torch.nn.functional.pad
    return {**part, TEXT: pad(text, (0, 0, 0, missing)), mask: pad(valid, (0, missing))}


def with_rows(value: Any, rows: int, wanted: Join, name: str) -> Any:
    """``value`` with the joined rows appended to every tensor in it that has ``rows`` rows; ``name`` leads to it.

    One row that stands for all is repeated where a joined row is to have another one, and left alone elsewhere.
    """

    def appended(x: Tensor, name: str) -> Tensor:
        if x.ndim and len(x) == 1 and name in wanted.own:
            x = x.expand(rows, *x.shape[1:])
        if not x.ndim or len(x) != rows:
            return x
        return torch.cat([x, wanted.own[name].to(x) if name in wanted.own else wanted.taken(x)])

    return _each_tensor(value, name, appended)


def _each_tensor(value: Any, name: str, change: Callable[[Tensor, str], Tensor]) -> Any:
    """``value`` with every tensor in it changed, given the name that leads to it."""
    if isinstance(value, Tensor):
        return change(value, name)
    if isinstance(value, dict):
        return {key: _each_tensor(v, f"{name}.{key}", change) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_each_tensor(v, f"{name}.{i}", change) for i, v in enumerate(value)])
    return value


def reach(inputs: Mapping[str, Any], name: str) -> Any:
    """The input that a name with dots leads to."""
    head, _, rest = name.partition(".")
    return reach(inputs[head], rest) if rest else inputs[head]


def replace(inputs: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """``inputs`` with another value where ``name`` leads to; the containers on the way are copied."""
    head, _, rest = name.partition(".")
    return {**inputs, head: replace(inputs[head], rest, value) if rest else value}
