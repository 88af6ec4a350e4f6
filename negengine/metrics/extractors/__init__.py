"""Networks that see: images -> features, and for some also images -> classes, or texts -> the same features. Each by its name.

A name with a colon is a function of one's own: ``package.module:function``, which may lie in the working folder, is called with a
list of images and returns a tensor ``[N, F]``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from negengine.metrics.extractors.base import Classes, Extractor, Images, batched, pixels
from negengine.metrics.extractors.large import clip, dinov2, dreamsim, inception

Loader = Callable[[str, Classes], Extractor]

EXTRACTORS: Mapping[str, Loader] = {
    "pixels": pixels,
    "dreamsim": dreamsim,
    "inception": inception,
    "clip": clip,
    "dinov2": dinov2,
}

__all__ = ["EXTRACTORS", "Classes", "Extractor", "Images", "Loader", "batched", "load_extractor"]


def load_extractor(name: str, device: str = "cpu", classes: Classes = (), more: Mapping[str, Loader] | None = None) -> Extractor:
    """The extractor of a name, ready to use.

    Args:
        classes: what a zero-shot reader is to choose from.
        more: further names.

    Raises:
        ValueError: there is no such name; says which there are. ImportError, MissingWeights: what it needs is not here.
    """
    known = {**EXTRACTORS, **(more or {})}
    if name in known:
        return known[name](device, classes)
    if ":" in name:
        return _own(name)
    raise ValueError(f"there is no feature extractor {name!r}; there are {', '.join(known)}, or MODULE:FUNCTION of your own")


def _own(name: str) -> Extractor:
    """A function ``images -> [N, F]`` that a user names."""
    module, _, function = name.partition(":")
    try:
        with _from_here():
            found = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module of a user's own may raise anything
        raise ValueError(f"the feature extractor {name} cannot be imported: {_told(error)}") from error
    if not callable(found):
        raise ValueError(f"the feature extractor {name} is no function of a list of images")
    whole = batched(found)

    def features(images: Images) -> Tensor:
        try:
            return whole(images)
        except Exception as error:
            raise ValueError(f"the feature extractor {name} failed: {_told(error)}") from error

    return Extractor(name=name, features=features)


@contextmanager
def _from_here() -> Iterator[None]:
    """With the working folder among the places of modules, as `python -m` has it and an installed command does not."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
