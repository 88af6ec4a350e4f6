"""DNP's pairs of tables: of three pictures of one prompt and seed, which is the best, or is there no clear winner?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from negengine.evaluate.measure import Row
from negengine.evaluate.protocols import Pairs
from negengine.metrics.intervals import Interval, mean_interval
from negengine.metrics.registry import LOWER, metric_named

NOBODY = "no clear winner"


@dataclass(frozen=True)
class Choice:
    """How often one choice was made. correctness, quality: shares of the pictures."""

    who: str
    correctness: Interval
    quality: Interval


@dataclass(frozen=True)
class PairTable:
    """One opponent of DNP. opponent: None for the base alone."""

    opponent: str | None
    pictures: int
    choices: tuple[Choice, ...]


def pair_tables(rows: Sequence[Row], protocol: Pairs) -> list[PairTable]:
    """A table for each variant between the base and ``dnp``; the base and ``dnp`` alone if there is none."""
    base, *others = protocol.variants
    opponents: list[str | None] = [name for name in others if name != "dnp"]
    tables = []
    for opponent in opponents or [None]:
        names = [base, *([opponent] if opponent else []), "dnp"]
        won = {what: _winners(rows, metric, names, protocol.margin) for what, metric in _judged(protocol)}
        choices = tuple(
            Choice(
                who,
                *(mean_interval(np.array([winner == who for winner in won[what]], dtype=float)) for what, _ in _judged(protocol)),
            )
            for who in (NOBODY, *names)
        )
        tables.append(PairTable(opponent, len(won["correctness"]), choices))
    return tables


def _judged(protocol: Pairs) -> tuple[tuple[str, str], ...]:
    return ("correctness", protocol.correctness), ("quality", protocol.quality)


def _winners(rows: Sequence[Row], metric: str, names: Sequence[str], margin: float) -> list[str]:
    """For each picture, whose score is best by more than the margin."""
    name = metric.partition(":")[0]
    sign = -1 if metric_named(name).better == LOWER else 1
    found = {row.variant: row.by_image for row in rows if metric in (row.metric, row.metric.partition(":")[0])}
    keys = list(found[names[0]])
    scores = sign * np.array([[found[name][key] for name in names] for key in keys])
    least = margin * scores.std()
    order = np.sort(scores, axis=1)
    clear = order[:, -1] - order[:, -2] > least
    return [names[int(best)] if sure else NOBODY for best, sure in zip(scores.argmax(1), clear, strict=True)]
