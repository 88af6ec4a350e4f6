"""The modules in a denoiser at which methods listen, and what is done where the model calls one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from negengine.diffusers.effect import Effect
from negengine.diffusers.families import Site
from negengine.diffusers.joint import images, put_back
from negengine.diffusers.rows import here
from negengine.diffusers.running import RunningCall

if TYPE_CHECKING:
    from negengine.diffusers.session import Session


@dataclass
class Place:
    """A module that is listened to: ``heard`` holds the effects that do, each with its own spot, see :meth:`Effect.spot`."""

    site: Site
    heard: list[tuple[Effect[Any], Any]] = field(default_factory=list)


def modules_at(denoiser: nn.Module, sites: Iterable[Site]) -> list[nn.Module]:
    """Where methods listen. Raises TypeError: a denoiser of a known class whose blocks are elsewhere, or a list, never called."""
    found = []
    for site in sites:
        try:
            found.append(denoiser.get_submodule(site.path))
        except AttributeError:
            raise TypeError(
                f"this {type(denoiser).__name__} has no module {site.path!r}, at which the tokens of its block {site.name!r} would "
                "be heard: its attention is computed elsewhere (in compiled or fused blocks). Methods that change predictions or "
                "embeddings alone (DNG, negative prompting, SLD, CADS, seed variance) do not need it"
            ) from None
        if isinstance(found[-1], (nn.ModuleList, nn.ModuleDict)):
            raise TypeError(
                f"{site.path!r}, at which the tokens of the block {site.name!r} would be heard, is a {type(found[-1]).__name__}, "
                f"which is never called; name one of its modules ({site.path}.{next(iter(dict(found[-1].named_children())), 0)})"
            )
    return found


def places(effects: Sequence[Effect[Any]]) -> list[Place]:
    """Every module that some effect wants to hear, each once."""
    found: dict[tuple[str, str], Place] = {}
    for effect in sorted(effects, key=lambda effect: effect.listens_last):
        for number, site in enumerate(effect.sites()):
            found.setdefault((site.path, site.where), Place(site)).heard.append((effect, effect.spot(number)))
    return list(found.values())


# Hooks are called in every block of every step: those that rest must read one attribute of what they are given, and no more.
# Where methods act, another thread may call the same denoiser for a pipeline that has none.


def at_input(running: RunningCall, session: Session, place: Place, module: nn.Module, args: tuple[Any, ...]) -> Any:
    if not running.active or here.running is not running:
        return None
    x = _heard(running, session, place, args[0])
    return None if x is args[0] else (x, *args[1:])


def at_output(running: RunningCall, session: Session, place: Place, module: nn.Module, args: Any, output: Any) -> Any:
    if not running.active or here.running is not running:
        return None
    first = output[0] if isinstance(output, tuple) else output
    x = _heard(running, session, place, first)
    if x is first:
        return None
    return (x, *output[1:]) if isinstance(output, tuple) else x


def _heard(running: RunningCall, session: Session, place: Place, x: Tensor) -> Tensor:
    """What takes the place of a site's tensor: itself, changed in place, unless the site is copied or an effect gives another."""
    site = place.site
    x = x.clone() if site.copied else x
    last = running.image_tokens if running.followed or site.image_first else None
    if not site.text_first and site.channels is None and last is None:
        return session.tokens(x, place)
    first = running.first_image_token if site.text_first else 0
    image = images(x, first, last, site.channels)
    session.tokens(image, place)
    put_back(x, first, image)
    return x


def at_arguments(
    running: RunningCall,
    session: Session,
    place: Place,
    names: tuple[str, ...],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if not running.active or here.running is not running:
        return None
    arguments = dict(zip(names, args, strict=False)) | kwargs
    for effect, spot in place.heard:
        if effect.active:
            arguments = effect.arguments(arguments, spot, here.rows)
    return (), arguments
