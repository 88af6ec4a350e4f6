"""One call of NegToMe, as every backend is given it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

ALIGNED = 16  # bytes: what lies on a multiple may be read in other ways


class Call(NamedTuple):  # making a frozen dataclass of as many fields takes 2 microseconds more, a tenth of a call
    """Checked arguments; ``B`` images of ``T`` source tokens, ``R`` images of ``M`` reference tokens, ``D`` channels.

    Attributes:
        x: ``[B, T, D]``.
        bank: ``[R, M, D]``, dtype and device of ``x``; ``x`` itself where images are pushed away from images of their own batch.
        references: int32 ``[B, K]``: the images of the bank that each image is pushed away from, ``-1`` where there is none.
        mask: bool ``[R, M]``, true where a token may be matched.
        matching: ``"paper"`` or ``"release"``.
        search: ``"auto"``, ``"exact"``, ``"bf16"``, ``"int8"`` or ``"fp8"``.
        y: ``[B, T, D]``, to be written; may be ``x``, whose old values are then read as if nothing had been written yet. None where
            only the match is asked for, and with it the fields below.
        alpha: float64 ``[B]``.
        threshold: float64 ``[1]``.
        keep: bool ``[B, T]``, false drops a token from merging.
        stats: int64 ``[3]``; merged tokens, tokens that had a reference, and one call are added.
        disjoint: the caller's word that no image both has a reference and is one.
        table: the entries of ``references`` row by row, where the caller knew them; see :meth:`entries`.
    """

    x: Tensor
    bank: Tensor
    references: Tensor
    mask: Tensor | None
    matching: str
    search: str
    y: Tensor | None = None
    alpha: Tensor | None = None
    threshold: Tensor | None = None
    keep: Tensor | None = None
    stats: Tensor | None = None
    disjoint: bool = False
    table: Sequence[int] | None = None

    def entries(self) -> Sequence[int] | None:
        """The entries of ``references`` row by row; None where only the device knows them, since a read would wait for it."""
        if self.table is None and self.references.device.type == "cpu":
            return [image for row in self.references.tolist() for image in row]
        return self.table

    def signature(self) -> tuple[Any, ...]:
        """All that the work of a call depends on but the values of its tensors and where they lie: equal for calls alike."""
        x, bank, _, _, matching, search, y, *_, disjoint, table = self
        given = (x, self.references, None if bank is x else bank, self.mask, None if y is x else y)
        given += (self.alpha, self.threshold, self.keep, self.stats)
        tensors = [None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % ALIGNED) for t in given]
        shared = bank is not x and bank.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        same = y is x, shared, disjoint, None if table is None else tuple(table)
        return (matching, search, *same, *tensors)
