"""DNP's pairs of tables: of three pictures of one prompt and seed, which is the best, or is there no clear winner?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from negengine.evaluate.measure import GROUPS, PROMPTS, Row
from negengine.evaluate.protocols import Pairs
from negengine.metrics.intervals import Interval, share_interval, units_of
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
    """One opponent of DNP. opponent: None for the base alone. over: what is resampled: prompts or groups."""

    opponent: str | None
    pictures: int
    choices: tuple[Choice, ...]
    over: str = GROUPS


def pair_tables(rows: Sequence[Row], protocol: Pairs) -> list[PairTable]:
    """A table for each variant between the base and ``dnp``; the base and ``dnp`` alone if there is none."""
    base, *others = protocol.variants
    opponents: list[str | None] = [name for name in others if name != "dnp"]
    prompts = {group: prompt for row in rows for group, prompt in row.prompts.items()}
    tables = []
    for opponent in opponents or [None]:
        names = [base, *([opponent] if opponent else []), "dnp"]
        won = {what: _winners(rows, metric, names, protocol.margin) for what, metric in _judged(protocol)}
        shares = {who: [_share(won[what], who, prompts) for what, _ in _judged(protocol)] for who in (NOBODY, *names)}
        choices = tuple(Choice(who, *(share for share, _ in both)) for who, both in shares.items())
        tables.append(PairTable(opponent, len(won["correctness"]), choices, shares[NOBODY][0][1]))
    return tables


def _share(won: Mapping[str, str], who: str, prompts: Mapping[str, str | None]) -> tuple[Interval, str]:
    """How often one won, and what was resampled: pictures of a group depend on each other, so that they are averaged first."""
    of_group: dict[str, list[bool]] = {}
    for picture, winner in won.items():
        of_group.setdefault(picture.rpartition("/")[0], []).append(winner == who)
    means = {group: sum(found) / len(found) for group, found in of_group.items()}
    units, of_prompts = units_of(means, prompts)
    return share_interval(np.array(list(units.values()))), PROMPTS if of_prompts else GROUPS


def _judged(protocol: Pairs) -> tuple[tuple[str, str], ...]:
    return ("correctness", protocol.correctness), ("quality", protocol.quality)


def _winners(rows: Sequence[Row], metric: str, names: Sequence[str], margin: float) -> dict[str, str]:
    """Picture -> whose score is best by more than the margin."""
    name = metric.partition(":")[0]
    sign = -1 if metric_named(name).better == LOWER else 1
    found = {row.variant: row.by_image for row in rows if metric in (row.metric, row.metric.partition(":")[0])}
    keys = list(found[names[0]])
    scores = sign * np.array([[found[name][key] for name in names] for key in keys])
    least = margin * scores.std()
    order = np.sort(scores, axis=1)
    clear = order[:, -1] - order[:, -2] > least
    won = [names[int(best)] if sure else NOBODY for best, sure in zip(scores.argmax(1), clear, strict=True)]
    return dict(zip(keys, won, strict=True))
