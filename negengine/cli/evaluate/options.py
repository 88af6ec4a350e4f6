"""What the flags of ``negengine evaluate`` say, as one record; and which of them belong to which form of the command."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Common:
    """What both forms take."""

    output: Path
    metrics: Sequence[str]
    features: str | None
    labels: str | None
    classes: Sequence[str]
    against: Path | None
    base: str | None
    asset: Path | None
    forbidden: str | None
    device: str
    plot: bool


@dataclass(frozen=True, kw_only=True)
class OfFolders:
    """What is for folders alone."""

    group: str | None = None
    per_group: int | None = None
    prompts_of: Path | None = None


@dataclass(frozen=True, kw_only=True)
class OfPipelines:
    """What is for a running pipeline alone."""

    model: str | None = None
    protocol: str | None = None
    prompt: Sequence[str] = ()
    prompts: Path | None = None
    images: int | None = None
    repeats: int | None = None
    seed: Sequence[int] = ()
    variant: Sequence[str] = ()
    set: Sequence[str] = ()
    avoid: Sequence[str] = ()
    call: Sequence[str] = ()
    mask: Path | None = None
    rewrite: Path | None = None
    negatives: Sequence[str] = ()
    captioner: str | None = None
    scheduler: str | None = None
    dtype: str | None = None
    groups_a_call: int | None = None
    keep: bool | None = None


def given(options: OfFolders | OfPipelines) -> list[str]:
    """The flags that were given, as they are written."""
    return [f"--{name.replace('_', '-')}" for name, value in vars(options).items() if value not in (None, (), [])]


def refuse(options: OfFolders | OfPipelines, why: str) -> None:
    """Raises ValueError if one of these flags was given."""
    if found := given(options):
        raise ValueError(f"{' and '.join(found)} {'is' if len(found) == 1 else 'are'} {why}")


def own_keywords(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``values`` that are not None and that the dataclass ``kind`` has."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if value is not None and name in names}
