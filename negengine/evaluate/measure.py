"""The numbers of every variant: each metric for each group, or for the set of each seed, with intervals and differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from negengine.evaluate.asked import FROM_FILE, Asked
from negengine.evaluate.groups import Drawn, rows_of
from negengine.metrics.evidence import Evidence
from negengine.metrics.extractors import Extractor
from negengine.metrics.intervals import Interval, Values, difference_interval, mean_interval, share_interval, units_of
from negengine.metrics.registry import IMAGE, SET

PROMPTS, GROUPS, SEEDS = "prompts", "groups", "seeds"
COMPARED = "base_labels"  # what a metric needs that compares with the labels of the base
SHOWN = 10  # classes in an error; a reader may know a thousand


@dataclass(frozen=True, eq=False, kw_only=True)
class Beside:
    """What is given beside the images.

    Attributes:
        labels: of a file: variant -> a text for each image.
        expected: reader -> variant -> the class that is asked for in each image, as a word of that reader.
        reference: real images. asset: the picture to keep away from.
        forbidden: a class. base: the variant with which the others are compared.
    """

    base: str
    labels: Mapping[str, Sequence[str]] | None = None
    expected: Mapping[str, Mapping[str, Sequence[str]]] | None = None
    reference: Sequence[Image.Image] | None = None
    asset: Image.Image | None = None
    forbidden: str | None = None

    def classes_of_file(self) -> tuple[str, ...]:
        """The labels of the file, and the classes that are asked for or forbidden: no image may have their label."""
        found = {label for labels in (self.labels or {}).values() for label in labels}
        found |= {word for words in (self.expected or {}).get(FROM_FILE, {}).values() for word in words}
        return tuple(sorted(found | ({self.forbidden} if self.forbidden is not None else set())))


@dataclass(frozen=True)
class Row:
    """One metric of one variant.

    Attributes:
        values: for each group, or for the set of each seed.
        by_image: for metrics of single images: the image's name with its group -> value. prompts: group -> its prompt.
        interval: of the mean; None where there is no value. difference: from the base variant; None for the base itself, and
            where one of both has no value. paired: whether by the groups that both have.
        over: what is resampled: ``"prompts"`` (their means over groups), ``"groups"`` or ``"seeds"``. difference_over: the same.
        pairs: how many groups, or seeds of a set, are paired.
    """

    variant: str
    metric: str
    values: Mapping[str, float]
    interval: Interval | None
    difference: Interval | None = None
    paired: bool = False
    by_image: Mapping[str, float] = field(default_factory=dict)
    over: str = GROUPS
    difference_over: str = GROUPS
    pairs: int = 0
    prompts: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Seen:
    """One variant through the eyes of one extractor."""

    features: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None


def measure(
    drawn: Sequence[Drawn],
    asked: Sequence[Asked],
    extractors: Mapping[str, Extractor],
    beside: Beside,
    advance: Callable[[], object] = lambda: None,
    seed: int = 0,
) -> list[Row]:
    """A row for each metric and variant, the base first.

    Args:
        advance: called after each metric of each variant. seed: of the bootstrap.

    Raises:
        ValueError: a class that the reader does not know, or what a metric refuses.
    """
    drawn = sorted(drawn, key=lambda variant: variant.name != beside.base)
    eyes = _Eyes(extractors, beside)
    rows: list[Row] = []
    for one in asked:
        seen = {variant.name: eyes.look(variant, one) for variant in drawn}
        given = _Given(extractors.get(one.extractor or ""), *eyes.others(one), beside, seen, drawn[0])
        base: Row | None = None
        for variant in drawn:
            row = _row(variant, one, given, base, seed)
            base = base or row
            rows.append(row)
            advance()
    return rows


class _Eyes:
    """Every extractor sees every picture once, whatever number of metrics asks."""

    def __init__(self, extractors: Mapping[str, Extractor], beside: Beside) -> None:
        self.extractors, self.beside = extractors, beside
        self._kept: dict[tuple[str, str, bool], _Seen] = {}
        self._others: dict[tuple[str, str], Tensor] = {}

    def look(self, variant: Drawn, one: Asked) -> _Seen:
        if one.extractor is None:
            return _Seen()
        if one.extractor == FROM_FILE:
            assert self.beside.labels is not None
            classes = self.beside.classes_of_file()
            return _Seen(labels=_numbers(self.beside.labels[variant.name], classes), classes=classes)
        key = variant.name, one.extractor, one.reads
        if key not in self._kept:
            self._kept[key] = self._new(variant, self.extractors[one.extractor], one.reads)
        return self._kept[key]

    def others(self, one: Asked) -> tuple[Tensor | None, Tensor | None]:
        """Features of the reference images and of the asset, where the metric needs them."""
        asset = None if self.beside.asset is None else [self.beside.asset]
        return self._other("reference", one, self.beside.reference), self._other("asset", one, asset)

    def _other(self, need: str, one: Asked, images: Sequence[Image.Image] | None) -> Tensor | None:
        if images is None or one.extractor not in self.extractors or need not in one.metric.needs:
            return None
        key = need, str(one.extractor)
        if key not in self._others:
            self._others[key] = self.extractors[key[1]].features(images)
        return self._others[key]

    @staticmethod
    def _new(variant: Drawn, extractor: Extractor, reads: bool) -> _Seen:
        if reads and extractor.logits is not None:
            logits = extractor.logits(variant.images)
            return _Seen(logits=logits, labels=logits.argmax(-1), classes=extractor.classes)
        return _Seen(features=extractor.features(variant.images))


@dataclass(frozen=True, eq=False)
class _Given:
    """What one metric may use of all variants: the extractor, features of other pictures, and what was seen of each variant."""

    extractor: Extractor | None
    reference: Tensor | None
    asset: Tensor | None
    beside: Beside
    seen: Mapping[str, _Seen]
    base: Drawn


def _row(variant: Drawn, one: Asked, given: _Given, base: Row | None, seed: int) -> Row:
    values: dict[str, float] = {}
    by_image: dict[str, float] = {}
    for number, of_seed in variant.by_seed().items():
        part = of_seed.part
        others = _labels_of_other_seeds(number, variant.name, given) if COMPARED in one.metric.needs else None
        if COMPARED in one.metric.needs and others is None:
            continue
        evidence = _evidence(part, one, given, list(of_seed.rows), variant.name, others)
        found = one.metric.compute(evidence).tolist()
        if one.metric.unit == SET:
            values["all" if number is None else f"seed {number}"] = found[0]
            continue
        if one.metric.unit == IMAGE:
            names = [f"{group.key}/{k}" for group in part.groups for k in range(len(group.images))]
            by_image |= dict(zip(names, found, strict=True))
            found = [sum(found[row] for row in group) / len(group) for group in rows_of(part.groups)]
        values |= dict(zip((group.key for group in part.groups), found, strict=True))
    if not values:
        return Row(variant.name, one.key, {}, None)
    prompts = {group.key: group.prompt for group in variant.groups}
    least, most = one.metric.possible(max(len(group.images) for group in variant.groups))
    numbers, over = _independent(values, prompts, one)
    interval = (share_interval if one.metric.percent else mean_interval)(numbers, seed=seed).within(least, most)
    row = Row(variant.name, one.key, values, interval, by_image=by_image, over=over, prompts=prompts)
    return row if base is None or not base.values else _compared(row, base, one, (least, most), seed)


def _independent(values: Mapping[str, float], prompts: Mapping[str, str | None], one: Asked) -> tuple[Values, str]:
    """What is resampled, and its name."""
    if one.metric.unit == SET:
        return np.array(list(values.values())), SEEDS
    found, of_prompts = units_of(values, prompts)
    return np.array(list(found.values())), PROMPTS if of_prompts else GROUPS


def _compared(row: Row, base: Row, one: Asked, possible: tuple[float | None, float | None], seed: int) -> Row:
    """With its difference from the base: of the groups that both have, where there are two or more, or no others."""
    common = [key for key in row.values if key in base.values]
    paired = len(common) >= 2 or row.values.keys() == base.values.keys()
    mine, theirs = ({key: one.values[key] for key in common} if paired else one.values for one in (row, base))
    numbers, over = _independent(mine, row.prompts, one)
    others, _ = _independent(theirs, row.prompts if paired else base.prompts, one)
    difference = difference_interval(numbers, others, paired, seed=seed)
    least, most = possible
    if least is not None and most is not None:
        difference = difference.within(least - most, most - least)
    return replace(row, difference=difference, paired=paired, difference_over=over, pairs=len(common) if paired else 0)


def _labels_of_other_seeds(seed: int | None, name: str, given: _Given) -> Tensor | None:
    """What the base drew with the other seeds.

    Its own value would be too low if it were compared with a pool that holds it, and every other variant would look worse. Where
    it has no other seed, a variant is compared with the only one, and the base with nothing.
    """
    labels, base = given.seen[given.beside.base].labels, given.base
    if labels is None:
        return None
    rows = [row for other, of in base.by_seed().items() if other != seed for row in of.rows]
    if rows:
        return labels[rows]
    return None if name == base.name else labels


def _evidence(part: Drawn, one: Asked, given: _Given, rows: list[int], name: str, base_labels: Tensor | None) -> Evidence:
    mine, beside, extractor = given.seen[name], given.beside, given.extractor
    needs, classes = one.metric.needs, mine.classes
    words = beside.expected[str(one.extractor)][name] if "expected" in needs and beside.expected else None
    expected = None if words is None else [words[row] for row in rows]
    prompts = [group.prompt or "" for group in part.groups for _ in group.images]
    evidence = Evidence(
        images=part.images,
        groups=rows_of(part.groups),
        extractor=extractor,
        features=None if mine.features is None else mine.features[rows],
        logits=None if mine.logits is None else mine.logits[rows],
        labels=None if mine.labels is None else mine.labels[rows],
        classes=classes,
        prompts=prompts if all(prompts) else None,
        texts=extractor.texts(prompts) if "texts" in needs and extractor is not None and extractor.texts else None,
        expected=_numbers(expected, classes) if expected and classes else None,
        reference=given.reference,
        asset=given.asset,
        asset_image=beside.asset,
        forbidden=int(_numbers([beside.forbidden], classes)) if "forbidden" in needs and beside.forbidden and classes else None,
        base_labels=base_labels,
    )
    missing = evidence.missing(needs)
    if missing:
        raise ValueError(f"{one.key} needs {' and '.join(missing)}")
    return evidence


def _numbers(words: Sequence[str], classes: Sequence[str]) -> Tensor:
    strange = next((word for word in words if word not in classes), None)
    if strange is not None:
        more = f", … and {len(classes) - SHOWN} others" if len(classes) > SHOWN + 1 else ""
        there = ", ".join(classes[: SHOWN if more else None])
        raise ValueError(f"the class {strange!r} is none of those that are read: {there}{more}")
    return torch.tensor([classes.index(word) for word in words], dtype=torch.int64)


def class_in(prompt: str, classes: Sequence[str]) -> str | None:
    """The one class whose name stands in a prompt as whole words, the longest where one holds another; None: none, several."""
    words = _words(prompt)
    found = {name: _words(name) for name in classes if _words(name) in words}
    longest = [name for name in found if not any(name != other and found[name] in found[other] for other in found)]
    return longest[0] if len(longest) == 1 else None


def _words(text: str) -> str:
    """Without punctuation, and with a space on either side."""
    return f" {' '.join(''.join(c if c.isalnum() else ' ' for c in text.lower()).split())} "
