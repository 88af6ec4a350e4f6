"""Which attention blocks a method acts in, as users select them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from negengine.diffusers.families import Family, Site


def select(sites: list[Site], patterns: Sequence[str], family: Family) -> list[Site]:
    """The sites whose names are, begin with, or match one of the patterns.

    Raises:
        ValueError: a pattern that selects nothing, with what there is; or no site at all.
    """

    def fits(name: str, pattern: str) -> bool:
        return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)

    if not sites:
        raise ValueError(f"the family {family.name} names no attention block of this denoiser (Tokens.sites)")
    for pattern in patterns:
        if not any(fits(site.name, pattern) for site in sites):
            parts = sorted({".".join(site.name.split(".")[:2]) for site in sites})
            raise ValueError(
                f"no attention block of this {family.name} denoiser is named {pattern!r}; there are {', '.join(parts)}"
            )
    return [site for site in sites if any(fits(site.name, pattern) for pattern in patterns)]
