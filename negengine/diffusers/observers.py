"""Who wants to hear what the methods did, when a pipeline's call has ended."""

from __future__ import annotations

import logging
from collections.abc import Callable

from negengine.diffusers.report import Status

logger = logging.getLogger("negengine")
Observer = Callable[[Status], None]
_observers: tuple[Observer, ...] = ()


def observe(observer: Observer) -> Callable[[], None]:
    """Call ``observer`` with the :class:`Status` of every pipeline's call in this process that ends with methods applied to it.

    It is called in the thread of that call, before the images are decoded, also when the call has failed or was refused: the
    reports' ``stage`` says which. What it raises is logged with its traceback and not raised, since the images are not at fault.

    Returns:
        A function that ends it.
    """
    global _observers
    _observers += (observer,)
    return lambda: _forget(observer)


def _forget(observer: Observer) -> None:
    global _observers
    _observers = tuple(other for other in _observers if other is not observer)


def tell(status: Status) -> None:
    for observer in _observers:
        try:
            observer(status)
        except Exception:
            logger.exception("negengine: %r failed; the run goes on", observer)
