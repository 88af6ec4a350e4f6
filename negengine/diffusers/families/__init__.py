"""What the plug-in must know of a model family, and which families there are.

A new family is a new file that builds one :class:`Family` and a line at the end of this one; from outside the package,
:func:`register_family` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Grid = tuple[int, int]


@dataclass(frozen=True)
class Site:
    """A place where an attention output appears.

    Attributes:
        name: of the attention block, as users select it.
        path: of the module to listen to, below the denoiser.
        where: ``"input"`` or ``"output"`` of that module, a tensor ``[B, tokens, D]``.
        text_first: whether text tokens precede the image tokens there.
    """

    name: str
    path: str
    where: str
    text_first: bool = False


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: for messages and logs.
        component: attribute of the pipeline that holds the denoiser.
        pipelines: pipeline classes, for messages.
        unsupported: pipeline classes with such a denoiser that cannot be served -> why.
        matches: whether a module is a denoiser of this family.
        defaults: fields of :class:`negengine.NegToMe` that are None take these.
        sites: every attention block of a denoiser, in order of execution.
        sample: name of the denoiser's input that holds the latents.
        batched: names of its other inputs with one row per image (tensors, or containers of them).
        text_tokens: number of text tokens in a call, from its named inputs.
        latent_size: ``(height, width)`` of a call's latents, from its named inputs; None if they do not tell.
        token_grids: number of image tokens -> their grid, for latents of a height and width.
        pack: latents ``[A, C, h, w]`` -> rows as ``sample`` takes them.
    """

    name: str
    component: str
    pipelines: tuple[str, ...]
    matches: Callable[[nn.Module], bool]
    defaults: Mapping[str, Any]
    sites: Callable[[nn.Module], Iterable[Site]]
    sample: str
    batched: tuple[str, ...]
    text_tokens: Callable[[Mapping[str, Any]], int]
    latent_size: Callable[[Mapping[str, Any]], Grid | None]
    token_grids: Callable[[int, int], dict[int, Grid]]
    pack: Callable[[Tensor], Tensor]
    unsupported: Mapping[str, str] = field(default_factory=dict)


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


def with_family_defaults(settings: Any, target: Any) -> Any:
    """A method's settings as ``target``, a pipeline or a denoiser, will use them: no field left at None."""
    return settings.with_defaults(**find_denoiser(target)[1].defaults)


from negengine.diffusers.families.flux import FLUX  # noqa: E402  (the families need the records above)
from negengine.diffusers.families.sdxl import SDXL  # noqa: E402

register_family(FLUX)
register_family(SDXL)
