"""Examples of calls, drawn by a seeded generator: the same on every machine, with nothing to install where a backend is tried."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
import torch
from contract import KINDS, LAYOUTS, Case

COUNT = int(os.environ.get("NEGENGINE_EXAMPLES", "50"))  # fewer where a backend runs in an interpreter
LENGTHS = (15, 16, 17, 31, 33, 64, 65, 70)
CHANNELS = (16, 31, 33, 64, 65)
T = TypeVar("T")


class Draw:
    """The values of one example, by its number; those of example 0 are the first of what there is to choose from."""

    def __init__(self, number: int) -> None:
        self._first, self._random = number == 0, random.Random(number)

    def one_of(self, options: Sequence[T]) -> T:
        return options[0] if self._first else self._random.choice(options)

    def integer(self, low: int, high: int) -> int:
        """From ``low`` to ``high``, both included."""
        return self.one_of(range(low, high + 1))

    def flag(self) -> bool:
        return self.one_of((False, True))

    def seed(self) -> int:
        return self.integer(0, 2**31 - 1)

    def kind(self) -> str:
        return self.one_of(KINDS)

    def layout(self) -> str:
        return self.one_of(LAYOUTS)

    def length(self) -> int:
        return self.one_of((self.integer(1, 9), self.one_of(LENGTHS)))

    def channels(self) -> int:
        return self.one_of((self.integer(1, 9), self.one_of(CHANNELS)))

    def mask(self, *shape: int) -> torch.Tensor | None:
        """Bool, true in a share of its entries; None is a mask, too."""
        share = self.one_of((None, 0.0, 0.1, 0.5, 1.0))
        return None if share is None else torch.rand(*shape, generator=torch.Generator().manual_seed(self.seed())) < share


def examples(test: Callable[[Case, Draw], None]) -> Callable[[Case], None]:
    """The test with ``COUNT`` examples in turn; one that fails is named by its number."""

    @pytest.mark.examples
    def over_examples(case: Case) -> None:
        for number in range(COUNT):
            try:
                test(case, Draw(number))
            except BaseException:
                print(f"example {number} fails")
                raise

    over_examples.__name__, over_examples.__doc__ = test.__name__, test.__doc__
    return over_examples
