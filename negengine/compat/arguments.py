"""The release's arguments, as settings of this engine."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from negengine.compat.number import number, one_number, probability
from negengine.methods import NegToMe, ReferenceImage

FLOATS = range(0x7F800000)  # bit patterns of the float32 numbers from 0 on, in their order


def with_defaults(defaults: Any, given: Any) -> dict[str, Any]:
    """The default values, an instance of a module's ``NegtomeArgs``, with what is given in their place.

    Raises:
        TypeError: no dict. ValueError: an unknown key, which the release would drop.
    """
    known = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)}
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        hint = "; give dataclasses.asdict(...) of it" if dataclasses.is_dataclass(given) else ""
        raise TypeError(f"negtome_args must be a dict, got {type(given).__name__}{hint}")
    unknown = sorted(str(key) for key in set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown negtome_args {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return {**known, **given}


def translated(
    arguments: Mapping[str, Any],
    reference: str | ReferenceImage,
    group_size: int | None,
    blocks: Sequence[str],
    train_timesteps: int,
    rounded_to: torch.dtype | None = None,
    min_grid: int = 1,
) -> NegToMe | str:
    """Settings that do what the release does with ``arguments``; or, in words, why it merges nothing.

    Args:
        arguments: as of :func:`with_defaults`.
        blocks: full names of the attention blocks that they select.
        train_timesteps: of the scheduler.
        rounded_to: the dtype to which the release rounds a timestep before it looks whether it merges; None if it does not.
    """
    alpha = _alpha(arguments["merging_alpha"])
    threshold = one_number("merging_threshold", arguments["merging_threshold"])
    dropout = probability("merging_dropout", arguments["merging_dropout"])
    start, end = (one_number(name, arguments[name]) for name in ("merging_t_start", "merging_t_end"))
    timesteps = window(end, start, train_timesteps, rounded_to)
    if not blocks:
        return "no block is selected"
    if timesteps is None:
        return f"no timestep is at most merging_t_start={start:g} and at least merging_t_end={end:g}"
    if threshold > 1:
        return f"no cosine exceeds merging_threshold={threshold:g}"
    if dropout == 1:
        return "merging_dropout=1 leaves every token out"
    return NegToMe(
        alpha=alpha,
        threshold=max(threshold, -1.0),  # lower ones merge every token too
        timesteps=timesteps,
        dropout=dropout,
        blocks=blocks,
        min_grid=min_grid,
        reference=reference,
        matching="release",
        group_size=group_size,
    )


def _alpha(value: Any) -> float | tuple[float, ...]:
    """One for all, or of a tensor ``[n, 1, 1]`` one for each image."""
    alpha = number("merging_alpha", value.detach() if isinstance(value, Tensor) else value, finite=True)
    if not isinstance(alpha, Tensor):
        return float(alpha)
    if list(alpha.shape[1:]) != [1, 1]:
        raise ValueError(
            f"merging_alpha must be a number or a tensor [images, 1, 1], one number for each image, got {list(alpha.shape)}"
        )
    return tuple(alpha.flatten().tolist())


def window(low: float, high: float, train_timesteps: int, rounded_to: torch.dtype | None) -> tuple[float, float] | None:
    """The window of timesteps, of 1000, that lie in ``low`` to ``high`` once they are rounded; None if there are none."""
    low, high = max(low, 0), min(high, train_timesteps)
    if low <= high and rounded_to is not None:
        low, high = _unrounded(low, high, rounded_to)
    return (low * 1000 / train_timesteps, high * 1000 / train_timesteps) if low <= high else None


@functools.cache
def _unrounded(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """The smallest float32 that becomes at least ``low`` when it is rounded to ``dtype``, and the largest that becomes at most
    ``high``. A smallest above the largest: there is none between them."""

    def rounded(bits: int) -> float:
        return torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(dtype).item()

    first = bisect_left(FLOATS, True, key=lambda bits: rounded(bits) >= low)
    last = bisect_left(FLOATS, True, key=lambda bits: rounded(bits) > high) - 1
    return tuple(torch.tensor([first, last], dtype=torch.int32).view(torch.float32).tolist())


def images_of_a_prompt(call: Mapping[str, Any]) -> int | None:
    """One that is repeated in a list, or in the rows of embeddings, is one prompt. None: prompts are repeated unequally often."""
    prompt, embeds, runs = call.get("prompt"), call.get("prompt_embeds"), [1]
    if isinstance(prompt, list):
        runs = [len(list(run)) for _, run in itertools.groupby(prompt)]
    elif isinstance(embeds, Tensor):
        runs = embeds.flatten(1).unique_consecutive(return_counts=True, dim=0)[1].tolist()
    return (call.get("num_images_per_prompt") or 1) * runs[0] if len(set(runs)) == 1 else None


def beginning_with(blocks: Any, names: Collection[str]) -> list[str]:
    """Those of the attention blocks' names that begin with one of ``blocks``, as the release compares them.

    Raises:
        TypeError: no list of texts. ValueError: a text that no name begins with; or a single one, which the release reads letter
            by letter, if that does not happen to select what it says.
    """

    def begin(starts: Collection[str]) -> list[str]:
        return [name for name in names if f"{name}.processor".startswith(tuple(starts))]

    if isinstance(blocks, str):
        if begin([blocks]) != begin(list(blocks)):
            raise ValueError(
                f"the release reads blocks={blocks!r} letter by letter, which selects other blocks than it says; "
                f"give a list: blocks=[{blocks!r}]"
            )
        blocks = [blocks]
    if not isinstance(blocks, Collection) or not all(isinstance(block, str) for block in blocks):
        raise TypeError(f"blocks must be a list of texts, got {blocks!r}")
    for block in blocks:
        if not begin([block]):
            parts = sorted({".".join(name.split(".")[:2]) for name in names})
            raise ValueError(f"no attention block's name begins with {block!r}; there are {', '.join(parts)}")
    return begin(blocks)
