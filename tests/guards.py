"""Which cases of a test guard every change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def guarded(cases: Iterable[tuple[Any, ...]], guards: Callable[..., bool]) -> list[Any]:
    """``cases`` as parameters of a test; those of which ``guards(*case)`` is false wait for `make test-rest`."""
    return [pytest.param(*case, marks=() if guards(*case) else pytest.mark.exhaustive) for case in cases]
