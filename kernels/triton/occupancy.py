"""How the tiles of a search are dealt to the programs that run at once, and how busy that keeps them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

MANY = 64  # units of work per program from which on nothing is simulated: the last round hardly counts


@dataclass(frozen=True)
class Work:
    """A search in tiles.

    Attributes:
        row_tiles: of all images that have references.
        key_tiles: that each row tile meets.
        group: row tiles that are dealt together.
        programs: that run at once.
    """

    row_tiles: int
    key_tiles: int
    group: int
    programs: int


@functools.lru_cache(maxsize=4096)
def longest(work: Work, splits: int) -> int:
    """Tiles of the program that has most, when units are dealt in turn as ``match_kernel`` deals them."""
    sizes = [(i + 1) * work.key_tiles // splits - i * work.key_tiles // splits for i in range(splits)]
    units = work.row_tiles * splits
    if units >= MANY * work.programs:
        return -(-units // work.programs) * max(sizes)
    loads = [0] * min(work.programs, units)
    for unit in range(units):
        first = unit // (work.group * splits) * work.group
        height = min(work.row_tiles - first, work.group)
        loads[unit % work.programs] += sizes[unit % (work.group * splits) // height]
    return max(loads, default=0)


def fill(work: Work, splits: int) -> float:
    """Share of the programs' time that is work, until the last is done; of at least one row tile."""
    return work.row_tiles * work.key_tiles / (work.programs * longest(work, splits))


def best_splits(work: Work, least: int, most: int) -> int:
    """Into how many parts the keys are divided, ``least`` to ``most``: the fewest with which the longest program is shortest.

    Programs that run at once share row tiles as often as there are splits: ``least`` keeps their rows in the cache.
    """
    if work.row_tiles == 0:
        return 1
    return min(range(least, most + 1), key=lambda splits: (longest(work, splits), splits))
