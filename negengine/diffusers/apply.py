"""``apply``, ``remove`` and ``status``: putting methods on a pipeline, and taking them off again."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from negengine.diffusers.effect import Effect
from negengine.diffusers.effects import EFFECTS
from negengine.diffusers.families import Family, find_denoiser
from negengine.diffusers.report import Status
from negengine.diffusers.session import Session
from negengine.methods.base import Method

logger = logging.getLogger("negengine")
Target = TypeVar("Target")

_sessions: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()
_driven: weakref.WeakKeyDictionary[Any, Session] = weakref.WeakKeyDictionary()  # by pipeline


def apply(target: Target, *methods: Method, scheduler: Any = None) -> Target:
    """Put methods on a pipeline or a denoiser, beside those that are there. Only this instance changes.

    A method of a kind that is there already takes its place. Conditioning is edited before rows are joined, tokens are
    changed in the order in which the methods were applied, and at most one method decides the prediction.

    What a callback applies in the middle of a pipeline's call begins with the next call, also other settings of what is there.
    The other methods go on.

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
    pipe = None if isinstance(target, nn.Module) else target
    if pipe is not None and scheduler is not None:
        raise ValueError("a pipeline's own scheduler is followed; `scheduler` is for a bare denoiser")
    for settings in methods:
        EFFECTS[type(settings)].check(settings, family, pipe, scheduler)
    there = _effects_of(target, denoiser)
    if pipe is None and scheduler is None and set(there) - {type(settings) for settings in methods}:
        scheduler = _sessions[denoiser].scheduler  # of those that stay
    unscheduled = pipe is None and scheduler is None
    effects = there | {type(s): EFFECTS[type(s)](s, family, denoiser, unscheduled) for s in methods}
    _check_owners(effects)
    devices = {parameter.device for parameter in denoiser.parameters()}
    for settings in methods:
        effects[type(settings)].prove(devices, _dtype(denoiser), denoiser)
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
    session = _sessions.get(denoiser)
    if not kinds or session is None:
        _renew(target, denoiser, family, {}, None)
        return target
    kept = {type(effect.settings): effect for effect in session.effects if type(effect.settings) not in kinds}
    if len(kept) < len(session.effects):
        pipe = session.pipe()
        scheduler = session.scheduler if pipe is None else None
        _renew(denoiser if pipe is None else pipe, denoiser, family, kept, scheduler)
    return target


def status(target: Any) -> Status:
    """What the methods did in the last run of ``target``, or so far in the one that goes on.

    ``print`` it, or ask for one method: ``status(pipe)[negengine.NegToMe]``.

    Raises:
        ValueError: nothing is applied to ``target``, or to another pipeline that shares its denoiser.
    """
    denoiser, _ = find_denoiser(target)
    if denoiser not in _sessions:
        raise ValueError("no method is applied; call negengine.apply first")
    pipe = _sessions[denoiser].pipe()
    if not isinstance(target, nn.Module) and pipe is not None and pipe is not target:
        raise ValueError(
            f"no method is applied: what there was has been taken off when the {type(pipe).__name__} that shares this denoiser "
            "got methods of its own; call negengine.apply again"
        )
    return _sessions[denoiser].status()


@contextmanager
def suspended(target: Any) -> Iterator[None]:
    """A ``with`` in which no method acts on ``target``, whoever applied it; then all that was applied is there as before."""
    session = _sessions.get(find_denoiser(target)[0])
    if session is None:
        yield
        return
    with session.suspended():
        yield


def check_beside(pipe: Any, settings: Method) -> None:
    """Raises ValueError for a method that :func:`beside` could not add to a pipeline; nothing is changed."""
    denoiser, family = find_denoiser(pipe)
    _check_target(pipe, family)
    session, kind = _sessions.get(denoiser), EFFECTS[type(settings)]
    if session is not None and session.pipe() is not pipe:
        raise ValueError(
            f"{settings.title} is needed for one run, but methods are applied to its denoiser, or to a pipeline that shares it; "
            "remove them first"
        )
    if type(settings) in _effects_of(pipe, denoiser):
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


def applied_to(target: Any, kind: type[Method]) -> Effect[Any] | None:
    """What a method does to a pipeline now; None after ``remove``, or after ``apply`` to another that shares its denoiser."""
    return _effects_of(target, find_denoiser(target)[0]).get(kind)


def _renew(target: Any, denoiser: nn.Module, family: Family, effects: dict[type[Method], Effect[Any]], scheduler: Any) -> None:
    """Put a session of ``effects`` in the place of what there is."""
    before = _sessions.pop(denoiser, None)
    other = None if before is None or isinstance(target, nn.Module) else before.pipe()
    if effects and other is not None and other is not target:
        logger.warning(
            "methods act on one pipeline of those that share a denoiser: they are taken off the %s and put on the %s",
            type(other).__name__,
            type(target).__name__,
        )
    pipe = None if isinstance(target, nn.Module) else target
    running = None if before is None or pipe is None or other is not pipe or not effects else before.running
    for session in (before, _driven.pop(target, None)):  # the latter: its denoiser was replaced
        if session is not None:
            session.detach()
            if session.running is not running:
                session.running.change(())
    if not effects:
        return
    session = Session(pipe, denoiser, family, list(effects.values()), scheduler, running)
    if session.heard_places - (before.heard_places if before else set()):
        _forget_compiled(target, denoiser, family)
    _sessions[denoiser] = session
    if pipe is not None:
        _driven[pipe] = session


def _effects_of(target: Any, denoiser: nn.Module) -> dict[type[Method], Effect[Any]]:
    """By kind, what stays when a further method is applied to ``target``."""
    session = _sessions.get(denoiser)
    if session is None or session.pipe() is not (None if isinstance(target, nn.Module) else target):
        return {}
    return {type(effect.settings): effect for effect in session.effects}


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
    if any(kind.__name__ == "ModularPipeline" for kind in type(target).__mro__):
        raise TypeError(
            f"{type(target).__name__} is a modular pipeline: negengine.diffusers.guiders.with_negative_guidance puts DNG and "
            "negative prompting on it (docs/guiders.md); the other methods act on classic pipelines"
        )
    for kind in type(target).__mro__:
        if kind.__name__ in family.unsupported:
            raise TypeError(
                f"negengine does not support {type(target).__name__}: {family.unsupported[kind.__name__]}. "
                f"Of {family.name} it knows {', '.join(family.pipelines)}"
            )


def _check_owners(effects: dict[type[Method], Effect[Any]]) -> None:
    owners = [kind.title for kind in effects if kind.owns_prediction]
    if len(owners) > 1:
        raise ValueError(f"{' and '.join(owners)} would both decide the prediction; remove one of them first")


def _forget_compiled(target: Any, denoiser: nn.Module, family: Family) -> None:
    """Compiled code does not look for hooks that came after it.

    Nor do blocks alike that share code look whether one of them has none, unless ``skip_nnmodule_hook_guards`` is off: those that
    merge would run the code of those that do not.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    given = target if isinstance(target, nn.Module) else getattr(target, family.component)
    wrapped = given is not denoiser  # by torch.compile(module)
    if wrapped or any(module._compiled_call_impl is not None for module in denoiser.modules()):
        torch.compiler.reset()


def _dtype(denoiser: nn.Module) -> torch.dtype:
    """What the denoiser computes in: quantised weights are of another dtype."""
    return next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), torch.get_default_dtype())
