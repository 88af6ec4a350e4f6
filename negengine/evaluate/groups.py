"""Images as they are compared: in groups of a prompt and a seed, under the name of a variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image


@dataclass(frozen=True, eq=False)
class Group:
    """The images of one prompt and seed.

    Attributes:
        key: the same for the same prompt and seed of every variant.
        images: RGB. names: of their files, or of what stands for them.
        texts, negative_prompts: of each image, where they are not the prompt, and not the negative prompt of the call.
        prompt: a text; None if unknown. seed: None if unknown. image_seeds: of the noise of each image, where known.
        call_seed: that methods with noise of their own had when it was drawn; None if unknown.
    """

    key: str
    images: tuple[Image.Image, ...]
    names: tuple[str, ...]
    prompt: str | None = None
    texts: tuple[str, ...] = field(default=(), kw_only=True)
    negative_prompts: tuple[str, ...] = field(default=(), kw_only=True)
    seed: int | None = None
    image_seeds: tuple[int, ...] = ()
    call_seed: int | None = None


@dataclass(frozen=True, eq=False)
class Drawn:
    """All images of a variant.

    Attributes:
        name: of the variant. groups: its images.
        about: how it was made, as JSON can hold it.
    """

    name: str
    groups: tuple[Group, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[Image.Image]:
        return [image for group in self.groups for image in group.images]

    @property
    def names(self) -> list[str]:
        return [name for group in self.groups for name in group.names]

    def by_seed(self) -> dict[int | None, OfSeed]:
        """The groups of each seed, in order of appearance. Groups of different seeds may alternate, as the names of files do."""
        found: dict[int | None, tuple[list[Group], list[int]]] = {}
        for group, rows in zip(self.groups, rows_of(self.groups), strict=True):
            groups, of_seed = found.setdefault(group.seed, ([], []))
            groups.append(group)
            of_seed += rows
        return {seed: OfSeed(replace(self, groups=tuple(groups)), tuple(rows)) for seed, (groups, rows) in found.items()}


@dataclass(frozen=True, eq=False)
class OfSeed:
    """The groups of one seed. rows: which of all images of the variant theirs are, in their order."""

    part: Drawn
    rows: tuple[int, ...]


def rows_of(groups: Sequence[Group]) -> list[list[int]]:
    """For each group, the numbers of its images among all."""
    rows, start = [], 0
    for group in groups:
        rows.append(list(range(start, start + len(group.images))))
        start += len(group.images)
    return rows


def check_alike(drawn: Sequence[Drawn]) -> None:
    """Raises ValueError for images of unequal size, or groups of unequal number: their measures could not be compared."""
    sizes: dict[tuple[int, int], tuple[str, str]] = {}
    counts: dict[int, tuple[str, str]] = {}
    for variant in drawn:
        for image, name in zip(variant.images, variant.names, strict=True):
            sizes.setdefault(image.size, (variant.name, name))
        for group in variant.groups:
            counts.setdefault(len(group.images), (variant.name, group.key))
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise ValueError(
            f"the images are of unequal size: {first[1]} ({first[0]}) has {one[0]} x {one[1]} pixels and {second[1]} ({second[0]}) "
            f"{other[0]} x {other[1]}; resize them first"
        )
    if len(counts) > 1:
        (one_count, first), (other_count, second) = list(counts.items())[:2]
        raise ValueError(
            f"the groups are unequal: {first[1]} ({first[0]}) has {one_count} images and {second[1]} ({second[0]}) {other_count}; "
            f"--per-group {min(counts)} takes so many of each"
        )
