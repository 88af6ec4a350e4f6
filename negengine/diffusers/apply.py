"""``apply``, ``remove`` and ``status``: putting methods on a pipeline, and taking them off again."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import nn

from negengine.diffusers.compiled import prepare
from negengine.diffusers.described import check_names
from negengine.diffusers.effect import Effect
from negengine.diffusers.effects import EFFECTS
from negengine.diffusers.families import Family, find_denoiser
from negengine.diffusers.families.family import is_a
from negengine.diffusers.fingerprint import dtype_of
from negengine.diffusers.places import modules_at
from negengine.diffusers.report import Status
from negengine.diffusers.session import Session
from negengine.methods.base import Method, check_owners

logger = logging.getLogger("negengine")
Target = TypeVar("Target")
Acting = TypeVar("Acting", bound=Effect[Any])

_sessions: weakref.WeakKeyDictionary[nn.Module, list[Session]] = weakref.WeakKeyDictionary()  # of its pipelines, or of itself
_ends: weakref.WeakKeyDictionary[nn.Module, Callable[[], None]] = weakref.WeakKeyDictionary()  # see :func:`when_removed`
_driven: weakref.WeakKeyDictionary[Any, Session] = weakref.WeakKeyDictionary()  # by pipeline


def apply(target: Target, *methods: Method, scheduler: Any = None) -> Target:
    """Put methods on a pipeline or a denoiser, beside those that are there. Only this instance changes.

    Pipelines that share a denoiser (``from_pipe``) have each their own methods, which act in their own calls. Methods on the
    denoiser itself act in all calls, and take the place of those on pipelines.

    A method of a kind that is there already takes its place. Conditioning is edited before rows are joined, tokens are
    changed in the order in which the methods were applied, and at most one method decides the prediction.

    What a callback applies in the middle of a pipeline's call, also other settings of what is there, acts from the next step on.
    If nothing was applied when the call began, nobody heard its prompts, and it begins with the next call.

    Args:
        target: a diffusers pipeline, or its denoiser. For a denoiser, give ``NegToMe(group_size=...)`` and either the
            ``scheduler`` that is stepped beside it or ``timesteps=(0, 1000)``.
        methods: settings; None fields take the defaults of the model family.
        scheduler: for a bare denoiser only; a pipeline's own is followed, also when it is replaced.

    Returns:
        ``target``.

    Raises:
        TypeError: a target of no known family, or settings of no known method.
        ValueError: settings that cannot work on this target or together; nothing has been changed then.
    """
    _check_methods(methods)
    denoiser, family = find_denoiser(target)
    _check_target(target, family)
    check_names(family, denoiser)
    pipe = None if isinstance(target, nn.Module) else target
    if pipe is not None and scheduler is not None:
        raise ValueError("a pipeline's own scheduler is followed; `scheduler` is for a bare denoiser")
    for settings in methods:
        _check_rows(target, family, settings)
        EFFECTS[type(settings)].check(settings, family, pipe, scheduler)
    session = _own(target, denoiser)
    there = _effects_of(session)
    if session is not None and pipe is None and scheduler is None and set(there) - {type(settings) for settings in methods}:
        scheduler = session.scheduler  # of those that stay
    unscheduled = pipe is None and scheduler is None
    effects = there | {type(s): EFFECTS[type(s)](s, family, denoiser, unscheduled) for s in methods}
    check_owners(effects)
    modules_at(denoiser, (site for effect in effects.values() for site in effect.sites()))
    devices = {parameter.device for parameter in denoiser.parameters()}
    for settings in methods:
        effects[type(settings)].prove(devices, dtype_of(denoiser), denoiser)
    if session is not None:
        session.running.admit([effects[type(settings)] for settings in methods], denoiser)
    _renew(target, denoiser, family, effects, scheduler)
    return target


def remove(target: Target, *kinds: type[Method]) -> Target:
    """Take methods off, all if none are named; nothing of them remains. Does nothing if they are not there. Returns ``target``.

    In the middle of a pipeline's call they act no more from the next step on; the others go on.

    Args:
        kinds: classes of settings, such as ``negengine.NegToMe``.

    Raises:
        TypeError: a kind that is no method.
    """
    for kind in kinds:
        if kind not in EFFECTS:
            raise TypeError(f"{kind!r} is no method; there are {_known()}")
    denoiser, family = find_denoiser(target)
    acting = _of(denoiser)
    if not isinstance(target, nn.Module):
        acting = [session for session in acting if session.bare or session.pipe() is target]
    for session in acting:
        there = _effects_of(session)
        kept = {kind: effect for kind, effect in there.items() if kinds and kind not in kinds}
        if len(kept) < len(there):
            scheduler = session.scheduler if session.bare else None
            _renew(denoiser if session.bare else session.pipe(), denoiser, family, kept, scheduler)
    if not acting:
        _renew(target, denoiser, family, {}, None)
    return target


def status(target: Any) -> Status:
    """What the methods did in the last run of ``target``, or so far in the one that goes on.

    ``print`` it, or ask for one method: ``status(pipe)[negengine.NegToMe]``.

    Raises:
        ValueError: nothing is applied to ``target``, whatever is to another pipeline that shares its denoiser.
    """
    denoiser, _ = find_denoiser(target)
    sessions = _of(denoiser)
    acting = [session for session in sessions if session.bare or session.pipe() is target]
    if isinstance(target, nn.Module) and len(sessions) == 1:
        acting = sessions
    if not acting:
        others = " and ".join(type(other.pipe()).__name__ for other in sessions)
        hint = f"; those on the {others} that shares its denoiser act in the calls of that one" if others else ""
        raise ValueError(f"no method is applied to this {type(target).__name__}; call negengine.apply first{hint}")
    return acting[0].status()


@contextmanager
def suspended(target: Any) -> Iterator[None]:
    """A ``with`` in which no method acts on ``target``, whoever applied it; then all that was applied is there as before."""
    with ExitStack() as stack:
        for session in _of(find_denoiser(target)[0]):
            stack.enter_context(session.suspended())
        yield


def check_beside(pipe: Any, settings: Method) -> None:
    """Raises ValueError for a method that :func:`beside` could not add to a pipeline; nothing is changed."""
    denoiser, family = find_denoiser(pipe)
    _check_target(pipe, family)
    _check_rows(pipe, family, settings)
    kind = EFFECTS[type(settings)]
    if any(session.bare for session in _of(denoiser)):
        raise ValueError(
            f"{settings.title} is needed for one run, but methods are applied to the denoiser itself; remove them first"
        )
    if type(settings) in _effects_of(_own(pipe, denoiser)):
        raise ValueError(
            f"{settings.title} is applied already, and is needed here with a prompt of its own; take it off first: "
            f"negengine.remove(pipe, negengine.{type(settings).__name__})"
        )
    kind.check(settings, family, pipe, None)
    kind(settings, family, denoiser)


@contextmanager
def beside(pipe: Any, *methods: Method) -> Iterator[None]:
    """A ``with`` in which further methods act, if any, beside those that are applied. Raises as :func:`check_beside`."""
    for settings in methods:
        check_beside(pipe, settings)
    if methods:
        apply(pipe, *methods)
    try:
        yield
    finally:
        if methods:
            remove(pipe, *map(type, methods))


@contextmanager
def alone(pipe: Any, make: Callable[[Family, nn.Module], Acting]) -> Iterator[Acting]:
    """A ``with`` in which the one effect that ``make`` makes acts on a pipeline, and no method that is applied."""
    denoiser, family = find_denoiser(pipe)
    _check_target(pipe, family)
    effect = make(family, denoiser)
    modules_at(denoiser, effect.sites())
    with suspended(pipe):
        session = Session(pipe, denoiser, family, [effect], None)
        try:
            yield effect
        finally:
            session.detach()


def applied_to(target: Any, kind: type[Method]) -> Effect[Any] | None:
    """What a method does to a pipeline now; None if it is not applied to this one."""
    return _effects_of(_own(target, find_denoiser(target)[0])).get(kind)


def when_removed(denoiser: nn.Module, end: Callable[[], None]) -> None:
    """Call ``end`` when the last method is taken off ``denoiser``."""
    _ends[denoiser] = end


def _of(denoiser: nn.Module) -> list[Session]:
    """The sessions on a denoiser, without those whose pipeline is gone."""
    for session in list(_sessions.get(denoiser, ())):
        if not session.bare and session.pipe() is None:
            session.detach()
    return list(_sessions.get(denoiser, ()))


def _own(target: Any, denoiser: nn.Module) -> Session | None:
    """What was applied to this very target."""
    bare = isinstance(target, nn.Module)
    return next((s for s in _of(denoiser) if (s.bare if bare else s.pipe() is target)), None)


def _effects_of(session: Session | None) -> dict[type[Method], Effect[Any]]:
    """By kind, in their order."""
    return {} if session is None else {type(effect.settings): effect for effect in session.effects}


def _renew(target: Any, denoiser: nn.Module, family: Family, effects: dict[type[Method], Effect[Any]], scheduler: Any) -> None:
    """Put a session of ``effects`` in the place of what there is, and of what could not act beside it."""
    pipe = None if isinstance(target, nn.Module) else target
    there, before = _of(denoiser), _own(target, denoiser)
    beside = [session for session in there if effects and session.bare != (pipe is None)]
    if beside:
        names = " and ".join("denoiser" if session.bare else type(session.pipe()).__name__ for session in beside)
        logger.warning("methods act on a denoiser or on its pipelines: those on the %s are taken off", names)
    running = before.running if before is not None and pipe is not None and effects else None
    for session in (before, *beside, _driven.pop(target, None)):  # the latter: its denoiser was replaced
        if session is not None:
            session.detach()
            if session.running is not running:
                session.running.change(())
    if not effects:
        if denoiser in _ends and not _of(denoiser):
            _ends.pop(denoiser)()
        return
    sessions = _sessions.setdefault(denoiser, [])
    session = Session(pipe, denoiser, family, list(effects.values()), scheduler, running, sessions)
    prepare(target, denoiser, family)
    if pipe is not None:
        _driven[pipe] = session


def _check_methods(methods: tuple[Method, ...]) -> None:
    if not methods:
        raise TypeError(f"no method given; there are {_known()}")
    for settings in methods:
        if type(settings) not in EFFECTS:
            meant = f"the class {settings.__name__}; call it" if isinstance(settings, type) else type(settings).__name__
            raise TypeError(f"settings must be of {_known()}, got {meant}")
    if len({type(settings) for settings in methods}) < len(methods):
        raise ValueError("two settings of one method; a pipeline takes one of a kind")


def _known() -> str:
    return ", ".join(f"negengine.{kind.__name__}" for kind in EFFECTS)


def _check_target(target: Any, family: Family) -> None:
    by_hand = f"act on its denoiser: negengine.apply(pipe.{family.component}, NegToMe(group_size=...), scheduler=pipe.scheduler)"
    if any(kind.__name__ == "ModularPipeline" for kind in type(target).__mro__):
        raise TypeError(
            f"{type(target).__name__} is a modular pipeline: negengine.diffusers.guiders.with_negative_guidance puts DNG and "
            f"negative prompting on it (docs/guiders.md), and NegToMe can {by_hand}; "
            "the other methods act on classic pipelines"
        )
    for kind in type(target).__mro__:
        if kind.__name__ in family.unsupported:
            raise TypeError(
                f"negengine does not support {type(target).__name__}: {family.unsupported[kind.__name__]}. "
                f"Of {family.name} it knows {', '.join(family.pipelines)}"
            )
    missing = [name for name in ("encode_prompt", "prepare_latents") if not hasattr(target, name)]
    if missing and is_a(target, "DiffusionPipeline"):
        raise TypeError(
            f"{type(target).__name__} has no {' and no '.join(missing)}, by which negengine hears that a call begins; "
            f"NegToMe can {by_hand}"
        )


def _check_rows(target: Any, family: Family, settings: Method) -> None:
    """Raises ValueError: a method that must tell rows apart or add some, and a pipeline whose rows do not let it."""
    for kind in type(target).__mro__:
        if kind.__name__ in family.unlike and EFFECTS[type(settings)].tells_branches:
            raise ValueError(
                f"{settings.title} must know which rows of a batch are conditional or add rows of its own, and cannot on "
                f"{type(target).__name__}: {family.unlike[kind.__name__]}. NegToMe works there"
            )
