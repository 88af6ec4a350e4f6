"""Which model families there are.

A new family is a new file that builds one :class:`Family` and a line at the end of this one; from outside the package,
:func:`register_family` does the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from negengine.diffusers.families.chroma import CHROMA
from negengine.diffusers.families.family import Conditioning, Family, Grid, Latents, Site, Tokens
from negengine.diffusers.families.flux import FLUX
from negengine.diffusers.families.flux2 import FLUX2
from negengine.diffusers.families.lumina import LUMINA
from negengine.diffusers.families.qwen import QWEN
from negengine.diffusers.families.sd import SD
from negengine.diffusers.families.sd3 import SD3
from negengine.diffusers.families.sdxl import SDXL
from negengine.diffusers.families.z_image import Z_IMAGE
from negengine.methods import KINDS
from negengine.methods.base import Method

__all__ = [
    "Conditioning",
    "Family",
    "Grid",
    "Latents",
    "Site",
    "Tokens",
    "find_denoiser",
    "forget_family",
    "is_built_in",
    "is_registered",
    "register_family",
    "registered",
]

Settings = TypeVar("Settings", bound=Method)
_BUILT_IN = (FLUX, SDXL, SD, SD3, QWEN, CHROMA, FLUX2, LUMINA, Z_IMAGE)
_FAMILIES: dict[str, Family] = {}  # the first that fits a denoiser is taken


def register_family(family: Family) -> None:
    """Make ``apply`` accept the denoisers of another family.

    Raises:
        TypeError, ValueError: there is one of that name, or its ``defaults`` name no method, or fields or values that it refuses.
    """
    if family.name in _FAMILIES:
        raise ValueError(f"family {family.name!r} is registered already")
    _check_defaults(family)
    _FAMILIES[family.name] = family


def _check_defaults(family: Family) -> None:
    for name, given in family.defaults.items():
        if name not in KINDS:
            raise ValueError(
                f"defaults of the family {family.name} name {name!r}, which is no method; there are {', '.join(KINDS)}"
            )
        fields = {field.name: field for field in dataclasses.fields(KINDS[name])}
        for field in given:
            if field not in fields:
                raise ValueError(f"defaults of the family {family.name} name {field!r}; {name} has {', '.join(fields)}")
        if all(field in given or fields[field].default is not dataclasses.MISSING for field in fields):
            KINDS[name](**given)  # raises for values that cannot work


def is_registered(family: Family) -> bool:
    """Whether :func:`register_family` had this very one, and it is not undone."""
    return _FAMILIES.get(family.name) is family


def is_built_in(family: Family) -> bool:
    """Whether it is one of the package's own, which its tests hold against their denoisers."""
    return any(family is known for known in _BUILT_IN)


def forget_family(family: Family) -> None:
    """Undo :func:`register_family`, if it is not undone yet."""
    if is_registered(family):
        del _FAMILIES[family.name]


@contextmanager
def registered(family: Family) -> Iterator[Family]:
    """As :func:`register_family`, for the duration of a ``with``."""
    register_family(family)
    try:
        yield family
    finally:
        forget_family(family)


def find_denoiser(target: Any) -> tuple[nn.Module, Family]:
    """The denoiser of a pipeline (or the denoiser itself) and its family.

    Raises:
        TypeError: no family fits, with what works for others; or it is no pipeline and no module.
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
    if not candidates and not hasattr(type(target), "components"):
        got = "None" if target is None else type(target).__name__
        raise TypeError(f"negengine takes a pipeline of diffusers, or its denoiser (a torch.nn.Module), got {got}")
    known = ", ".join(family.name for family in _FAMILIES.values() if family.component)  # not modules that are attached to
    raise TypeError(
        f"negengine does not know {type(target).__name__}{inside}. negengine.attach puts NegToMe on any denoiser (docs/attach.md); "
        "for the other methods add a family, described by negengine.diffusers.Family, with register_family (docs/families.md). "
        f"It knows {known}."
    )


def with_family_defaults(settings: Settings, target: Any) -> Settings:
    """A method's settings as ``target``, a pipeline or a denoiser, will use them: no field left at None that the family sets."""
    return find_denoiser(target)[1].with_defaults(settings)


for _family in _BUILT_IN:
    register_family(_family)
