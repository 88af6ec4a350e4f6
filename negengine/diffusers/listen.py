"""Listening to a method of one object, without touching its class."""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any


class Unpicklable:
    """What listens to a module that somebody may want to pickle: refused, with what would work. Deep copies are another matter."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a module is not pickled with the methods of negengine that are on it: take them off first (negengine.remove, or "
            "remove() of what negengine.attach returned), or save its state_dict(), which they do not touch"
        )


class MethodListener:
    """Calls back after ``owner.name(...)`` returns, until removed.

    Listeners may be stacked, also by other libraries, and removed in any order: one that is buried under another
    stays in the chain and only falls silent.
    """

    def __init__(self, owner: Any, name: str, heard: Callable[[Mapping[str, Any], Any], None]) -> None:
        """``heard(arguments by name, result)`` is called after each call."""
        self._owner, self.name, self.heard = weakref.ref(owner), name, heard
        _copied_without_listeners(type(owner))
        call = _Call(getattr(owner, name), self)
        setattr(owner, name, call)
        self._call = weakref.ref(call)  # the owner holds it; a listener must not hold the owner

    def remove(self) -> None:
        owner, call = self._owner(), self._call()
        if owner is None or call is None:
            return
        call.listener = None
        if vars(owner).get(self.name) is not call:
            return
        while isinstance(call.original, _Call) and call.original.listener is None:
            call = call.original  # buried when it was removed
        if call.overrode_instance:
            setattr(owner, self.name, call.original)
        else:
            delattr(owner, self.name)


class _Call:
    """The callable that stands in for the method."""

    def __init__(self, original: Callable[..., Any], listener: MethodListener) -> None:
        functools.update_wrapper(self, original)
        self.original = original
        self.listener: MethodListener | None = listener
        self.overrode_instance = listener.name in vars(listener._owner())
        self.signature = inspect.signature(original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.original(*args, **kwargs)
        if self.listener is not None:
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self.listener.heard(bound.arguments, result)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copied scheduler or pipeline is not listened to; it must not call the original's method either.
        owner = getattr(self.original, "__self__", None)
        if owner is None or id(owner) not in memo:
            return copy.deepcopy(self.original, memo)
        return getattr(type(owner), self.original.__name__).__get__(memo[id(owner)])


def _copied_without_listeners(kind: type) -> None:
    """Make shallow copies of a class's instances call their own methods: an instance's stand-ins would call the original's."""
    if "__copy__" in vars(kind) or kind in copyreg.dispatch_table:
        return

    def reduce(owner: Any) -> tuple[Any, ...]:
        make, arguments, state, *items = (*owner.__reduce_ex__(4), None, None)[:5]
        if isinstance(state, dict):
            state = {name: _unheard(value) for name, value in state.items() if not _added(value)}
        return make, arguments, state, *items

    copyreg.pickle(kind, reduce)


def _added(value: Any) -> bool:
    """Whether an instance has an attribute only since it is listened to."""
    while isinstance(value, _Call) and value.overrode_instance:
        value = value.original
    return isinstance(value, _Call)


def _unheard(value: Any) -> Any:
    while isinstance(value, _Call):
        value = value.original
    return value
