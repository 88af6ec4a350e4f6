"""The papers' protocols as frozen settings: which prompts, how many images, which variants, which metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import ClassVar

from negengine.metrics.registry import IMAGE, metric_named

# NegToMe's 20 categories, and five of the beginnings of a prompt that its published evaluation code uses
CATEGORIES = (
    "bird", "mammal", "animal", "boat", "building", "bus", "car", "airplane", "fish", "insect",
    "dog", "cat", "dragon", "bridge", "person", "woman", "man", "child", "shirt", "dress",
)  # fmt: skip
PREFIXES = ("a photo of a", "a good photo of a", "a high contrast photo of a", "a photo of the", "a high quality image of a")


def _prompt(prefix: str, name: str) -> str:
    article = "n" if prefix.endswith(" a") and name[0] in "aeiou" else ""
    return f"{prefix}{article} {name}"


MOST = 1000  # prompts, and images of a prompt: each image has a seed of its own


@dataclass(frozen=True)
class Case:
    """A group to be drawn: a prompt and a seed, and the seeds of its images."""

    key: str
    prompt: str
    seed: int
    image_seeds: tuple[int, ...]


def prompt_of(key: str) -> str | None:
    """The prompt of a group, from the key of its case; None for what is no such key."""
    return key.rpartition(", seed ")[0] or None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What all protocols have.

    Args:
        prompts: what is drawn.
        images: of a group: of one prompt, together.
        repeats: groups of each prompt and seed.
        seeds: of the whole; three or more tell how much seeds matter.
        variants: names of what is compared; the first is the base.
        metrics: ``NAME`` or ``NAME:EXTRACTOR``.

    Raises:
        ValueError: none of what is needed, something twice, or more than can have seeds of their own.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    empty: ClassVar[bool] = False  # whether a prompt may be empty

    prompts: tuple[str, ...]
    images: int = 4
    repeats: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = ("without", "negtome")
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what in ("prompts", "seeds", "variants", "metrics"):
            given = getattr(self, what)
            if not given:
                raise ValueError(f"the protocol {self.name} needs {what}")
            if len(set(given)) < len(given):
                twice = next(one for number, one in enumerate(given) if one in given[:number])
                raise ValueError(f"the protocol {self.name} has {twice!r} twice among its {what}")
        if not self.empty and any(not prompt.strip() for prompt in self.prompts):
            raise ValueError(f"the protocol {self.name} has an empty prompt")
        if min(self.images, self.repeats) < 1 or self.images * self.repeats > MOST or len(self.prompts) > MOST:
            raise ValueError(f"the protocol {self.name} takes 1 to {MOST} prompts, and 1 to {MOST} images of each")
        if min(self.seeds) < 0 or max(self.seeds) >= 2**32:
            raise ValueError(f"seeds must lie in 0 … 2**32 - 1, got {', '.join(map(str, self.seeds))}")

    def cases(self, seed: int) -> Iterator[Case]:
        """The groups of a seed, the same for every variant."""
        for number, prompt in enumerate(self.prompts):
            for again in range(self.repeats):
                key = f"{prompt or 'no prompt'}, seed {seed}" + (f", {again}" if self.repeats > 1 else "")
                first = (seed * MOST + number) * MOST + again * self.images
                yield Case(key, prompt, seed, tuple(range(first, first + self.images)))


@dataclass(frozen=True, kw_only=True)
class Diversity(Protocol):
    """NegToMe's protocol of output diversity: 20 categories by 5 prefixes, 4 images of a prompt (arXiv 2412.01339)."""

    name: ClassVar[str] = "diversity"
    about: ClassVar[str] = "do the images of a prompt differ more, and do they still show it?"

    prompts: tuple[str, ...] = tuple(_prompt(prefix, name) for prefix, name in product(PREFIXES, CATEGORIES))
    metrics: tuple[str, ...] = ("distance", "vendi", "clip-score")


@dataclass(frozen=True, kw_only=True)
class Asset(Protocol):
    """NegToMe's copyright protocol with an asset of one's own: drawn as prompted, with and without keeping away from it.

    Args:
        asset: file of the picture. mask: white where it is to be avoided.
    """

    name: ClassVar[str] = "asset"
    about: ClassVar[str] = "are the images less like a given picture, and do they still show the prompt?"

    asset: Path
    mask: Path | None = None
    variants: tuple[str, ...] = ("without", "asset")
    metrics: tuple[str, ...] = ("asset-similarity", "asset-correlation", "clip-score")

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, path in (("asset", self.asset), ("mask", self.mask)):
            if path is not None and not path.is_file():
                raise ValueError(f"there is no {what} {path}")
        if self.mask is None and "asset-masked" in self.variants:
            raise ValueError("the variant asset-masked needs a mask")


@dataclass(frozen=True, kw_only=True)
class Removal(Protocol):
    """DNG's class removal (arXiv 2410.14398): a prompt that leaves the class open, or none, and one class that is to be absent.

    Args:
        forbidden: the class, as the reader names it.
    """

    name: ClassVar[str] = "removal"
    about: ClassVar[str] = "is one class absent, and are the others as frequent as before?"
    empty: ClassVar[bool] = True

    forbidden: str
    images: int = 10
    repeats: int = 10
    variants: tuple[str, ...] = ("without", "dng", "negative-prompting")
    metrics: tuple[str, ...] = ("forbidden", "kl", "fid")


@dataclass(frozen=True, kw_only=True)
class Pairs(Protocol):
    """The pairs of tables in the supplement of DNP (arXiv 2411.05473): correctness and quality, against other negative prompts.

    People compared pictures there; here the metrics do. A picture wins if its score is best by more than ``margin``.

    Args:
        correctness, quality: metrics of single images, as in ``metrics`` or without their extractor.
        margin: in standard deviations of a score over all pictures; below it there is no clear winner.
    """

    name: ClassVar[str] = "pairs"
    about: ClassVar[str] = "which negative prompt gives the picture that shows the prompt best, and the best picture?"

    correctness: str = "clip-score"
    quality: str = "reference-distance"
    margin: float = 0.1
    variants: tuple[str, ...] = ("without", "random", "standard", "dnp")
    metrics: tuple[str, ...] = ("clip-score", "reference-distance")

    def __post_init__(self) -> None:
        super().__post_init__()
        for what in (self.correctness, self.quality):
            if what not in {*self.metrics, *(metric.partition(":")[0] for metric in self.metrics)}:
                raise ValueError(f"the protocol pairs compares by {what}, which is not among its metrics")
            if metric_named(what.partition(":")[0]).unit != IMAGE:
                raise ValueError(f"the protocol pairs compares single images, which {what} does not measure")
        if not self.margin >= 0:
            raise ValueError(f"margin must be 0 or more, got {self.margin}")
        if "dnp" not in self.variants or len(self.variants) < 2:
            raise ValueError("the protocol pairs compares dnp with at least one other variant")
        if self.variants[0] == "dnp":
            raise ValueError(
                "the protocol pairs compares dnp with the first variant, which must be another: --variant without first"
            )


PROTOCOLS: dict[str, type[Protocol]] = {kind.name: kind for kind in (Diversity, Asset, Removal, Pairs)}


def protocol_named(name: str) -> type[Protocol]:
    """Raises ValueError for a name that does not exist, with those that do."""
    if name not in PROTOCOLS:
        raise ValueError(f"there is no protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
