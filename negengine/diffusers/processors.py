"""Attention processors: some part the batch by its rows, and would take rows that a method joined for others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from negengine.diffusers.effect import Effect

ALONE = "treats_rows_alone"  # attribute of a processor, or of its class, whose owner knows
SHIPPED = "diffusers.models."  # all processors there treat each row alone, but those of perturbed attention guidance
PERTURBING = "PAG"  # how the names of the latter begin; :class:`negengine.diffusers.rows.Rows` gives them rows part by part


def check_processors(denoiser: nn.Module, effects: Iterable[Effect[Any]], parts: int) -> None:
    """Before the first step of a call whose rows stand in ``parts``.

    Raises:
        ValueError: an attention processor that may part the batch by rows is to get more of them than the pipeline passes.
    """
    for effect in effects:
        unknown = [
            (name, processor)
            for name, module in _widened(denoiser, effect)
            if (processor := getattr(module, "processor", None)) is not None and not _treats_rows_alone(processor, module, parts)
        ]
        if unknown:
            place, kind = unknown[0][0], _named(unknown[0][1])
            more = f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""
            raise ValueError(
                f"{effect.settings.title} joins rows to the batch, but the attention processor {kind} at {place!r}{more} may part "
                "the batch by rows (shared or cross-frame attention), which the joined ones would shift; take it off, or use what "
                f"joins no rows, such as NegToMe's groups. If it treats each row alone, say so: {kind}.{ALONE} = True"
            )


def _widened(denoiser: nn.Module, effect: Effect[Any]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that get rows which the pipeline does not pass."""
    if effect.joining:
        yield from denoiser.named_modules()
    else:
        yield from ((site.path, denoiser.get_submodule(site.path)) for site in effect.sites() if site.where == "arguments")


def _treats_rows_alone(processor: Any, attention: nn.Module, parts: int) -> bool:
    told = getattr(processor, ALONE, None)
    if told is not None:
        return bool(told)
    kind = type(getattr(processor, "_orig_mod", processor))  # torch.compile's wrapper
    if kind.__module__.startswith(SHIPPED):
        return parts > 1 or not kind.__name__.startswith(PERTURBING)
    return kind.__module__ == type(attention).__module__  # of a model that comes with its own


def _named(processor: Any) -> str:
    return str(getattr(processor, "__qualname__", type(processor).__qualname__))
