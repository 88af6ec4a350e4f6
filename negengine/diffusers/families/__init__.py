"""Which model families there are.

A new family is a new file that builds one :class:`Family` and a line at the end of this one; from outside the package,
:func:`register_family` does the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from negengine.diffusers.families.family import Conditioning, Family, Grid, Latents, Site, Tokens
from negengine.diffusers.families.flux import FLUX
from negengine.diffusers.families.sd import SD
from negengine.diffusers.families.sdxl import SDXL
from negengine.methods.base import Method

__all__ = ["Conditioning", "Family", "Grid", "Latents", "Site", "Tokens", "find_denoiser", "register_family", "registered"]

Settings = TypeVar("Settings", bound=Method)
_FAMILIES: dict[str, Family] = {}  # the first that fits a denoiser is taken


def register_family(family: Family) -> None:
    """Make ``apply`` accept the denoisers of another family; raises ValueError if there is one of that name."""
    if family.name in _FAMILIES:
        raise ValueError(f"family {family.name!r} is registered already")
    _FAMILIES[family.name] = family


@contextmanager
def registered(family: Family) -> Iterator[Family]:
    """As :func:`register_family`, for the duration of a ``with``."""
    register_family(family)
    try:
        yield family
    finally:
        del _FAMILIES[family.name]


def find_denoiser(target: Any) -> tuple[nn.Module, Family]:
    """The denoiser of a pipeline (or the denoiser itself) and its family.

    Raises:
        TypeError: no family fits; names those that do and how to add one.
    """
    if isinstance(target, nn.Module):
        candidates = [target]
    else:
        components = dict.fromkeys(family.component for family in _FAMILIES.values())
        candidates = [c for name in components if isinstance(c := getattr(target, name, None), nn.Module)]
    for candidate in candidates:
        denoiser = getattr(candidate, "_orig_mod", candidate)  # torch.compile's wrapper
        for family in _FAMILIES.values():
            if family.matches(denoiser):
                return denoiser, family
    inside = f" (its denoiser is a {type(candidates[0]).__name__})" if candidates and candidates[0] is not target else ""
    supported = "; ".join(f"{family.name}: {', '.join(family.pipelines)}" for family in _FAMILIES.values())
    raise TypeError(
        f"negengine does not know {type(target).__name__}{inside}. It knows {supported}, and their denoisers. "
        "To add a family, describe it with negengine.diffusers.Family and register_family (docs/families.md)."
    )


def with_family_defaults(settings: Settings, target: Any) -> Settings:
    """A method's settings as ``target``, a pipeline or a denoiser, will use them: no field left at None that the family sets."""
    return find_denoiser(target)[1].with_defaults(settings)


for _family in (FLUX, SDXL, SD):
    register_family(_family)
