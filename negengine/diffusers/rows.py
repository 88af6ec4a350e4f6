"""The rows of a denoiser's batch: those that the pipeline passes, then those that effects join to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from negengine.diffusers.families import Conditioning


@dataclass(frozen=True)
class Join:
    """Rows that an effect wants beside those of the pipeline.

    Attributes:
        owner: int64 ``[k]``, or a slice of k rows: of which row each new row takes the inputs.
        own: inputs by name (a name with dots leads into a container) that the new rows have of their own, ``[k, ...]``.
    """

    owner: Tensor | slice
    own: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.owner.stop - self.owner.start if isinstance(self.owner, slice) else len(self.owner)


class Rows:
    """How many rows of the current call are the pipeline's.

    Attributes:
        base: rows that the pipeline passed.
        total: with those that were joined.
    """

    def __init__(self) -> None:
        self.base = self.total = 0


def join(inputs: Mapping[str, Any], joins: Sequence[Join], conditioning: Conditioning) -> dict[str, Any]:
    """The denoiser's inputs with the rows of all ``joins`` appended to every input that has a row per image."""
    rows = len(inputs[conditioning.sample])
    return dict(inputs) | {
        name: with_rows(inputs[name], rows, joins, name) for name in (conditioning.sample, *conditioning.batched) if name in inputs
    }


def with_rows(value: Any, rows: int, joins: Sequence[Join], name: str) -> Any:
    """``value`` with the joined rows appended to every tensor in it that has ``rows`` rows; ``name`` leads to it.

    One row that stands for all is repeated where a joined row is to have another one, and left alone elsewhere.
    """
    if isinstance(value, Tensor):
        if value.ndim and len(value) == 1 and any(name in j.own for j in joins):
            value = value.expand(rows, *value.shape[1:])
        if not value.ndim or len(value) != rows:
            return value
        return torch.cat([value, *(j.own[name].to(value) if name in j.own else value[j.owner] for j in joins)])
    if isinstance(value, dict):
        return {key: with_rows(v, rows, joins, f"{name}.{key}") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([with_rows(v, rows, joins, f"{name}.{i}") for i, v in enumerate(value)])
    return value


def reach(inputs: Mapping[str, Any], name: str) -> Any:
    """The input that a name with dots leads to."""
    head, _, rest = name.partition(".")
    return reach(inputs[head], rest) if rest else inputs[head]


def replace(inputs: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """``inputs`` with another value where ``name`` leads to; the containers on the way are copied."""
    head, _, rest = name.partition(".")
    return {**inputs, head: replace(inputs[head], rest, value) if rest else value}
