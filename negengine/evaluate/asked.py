"""Which metrics are asked for, each with who sees for it; and whether all is there that they need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from negengine.evaluate.worlds import EMBEDDED
from negengine.metrics.evidence import WORDS
from negengine.metrics.extractors import Classes, Extractor, load_extractor
from negengine.metrics.registry import GROUP, SET, Metric, metric_named

READ = ("labels", "logits")  # needs that an extractor which reads classes meets
FROM_FILE = "file"  # in place of an extractor's name, where a file tells the labels


@dataclass(frozen=True)
class Asked:
    """A metric and the name of the extractor that sees for it; None if it needs none."""

    metric: Metric
    extractor: str | None

    @property
    def key(self) -> str:
        """As it stands in results: ``distance:dreamsim``."""
        return self.metric.name if self.extractor is None else f"{self.metric.name}:{self.extractor}"

    @property
    def reads(self) -> bool:
        return any(need in READ for need in self.metric.needs)


def asked_for(texts: Sequence[str], features: str | None = None, labels: str | None = None) -> list[Asked]:
    """The metrics of ``NAME`` or ``NAME:EXTRACTOR``.

    Args:
        features: who sees where a text does not say. labels: who reads classes; :data:`FROM_FILE` for a file.
            None: as the papers do.

    Raises:
        ValueError: no metric, one that does not exist or is given twice, or an extractor for a metric that takes none.
    """
    found: list[Asked] = []
    for text in texts:
        name, _, extractor = text.partition(":")
        metric = metric_named(name)
        if metric.extractor is None and extractor:
            raise ValueError(f"{name} takes no feature extractor, got {text}")
        one = Asked(metric, extractor or _usual(metric, features, labels))
        if one in found:
            raise ValueError(f"{one.key} is given twice")
        found.append(one)
    if not found:
        raise ValueError("give at least one metric")
    return found


def _usual(metric: Metric, features: str | None, labels: str | None) -> str | None:
    if "labels" in metric.needs:
        return labels or metric.extractor
    if "logits" in metric.needs:
        return metric.extractor if labels in (None, FROM_FILE) else labels
    if "texts" in metric.needs:
        return metric.extractor
    return metric.extractor and (features or metric.extractor)


def load_all(asked: Sequence[Asked], device: str, classes: Classes) -> dict[str, Extractor]:
    """The extractors by name, loaded; and whatever else the metrics need, tried.

    Raises:
        ValueError: an extractor that does not exist, or cannot do what its metric needs.
        ImportError, MissingWeights: what is not here.
    """
    for one in asked:
        if one.metric.prepare is not None:
            one.metric.prepare(device)
    names = dict.fromkeys(one.extractor for one in asked if one.extractor not in (None, FROM_FILE))
    loaded = {name: load_extractor(name, device, classes, EMBEDDED) for name in names if name is not None}
    for one in asked:
        extractor = loaded.get(one.extractor or "")
        if extractor is None:
            continue
        if one.reads and extractor.logits is None:
            way = (
                "give --class NAME for each class"
                if extractor.name == "clip"
                else "inception, clip with --class, or " + ", ".join(EMBEDDED)
            )
            raise ValueError(f"{one.metric.name} needs an extractor that reads classes, and {extractor.name} reads none; {way}")
        if "texts" in one.metric.needs and extractor.texts is None:
            raise ValueError(f"{one.metric.name} needs an extractor that reads texts, and {extractor.name} reads none; take clip")
    return loaded


def check_needs(
    asked: Sequence[Asked], there: Collection[str], per_group: int, images: int, ways: Mapping[str, str], references: int = 0
) -> None:
    """Raises ValueError for a metric that lacks something, or has too few images.

    Args:
        there: fields of ``Evidence`` that will be there beside what the extractors give.
        per_group: images in a group. images: in a set.
        ways: field -> what to give. references: how many reference images there are.
    """
    given = {"features", "logits", "labels", "texts", "classes", "extractor", *there}
    for one in asked:
        missing = [need for need in one.metric.needs if need not in given]
        if missing:
            how = "; ".join(dict.fromkeys(ways[need] for need in missing if need in ways))
            raise ValueError(f"{one.metric.name} needs {' and '.join(WORDS[need] for need in missing)}{f': {how}' if how else ''}")
        number, where = (per_group, "a group") if one.metric.unit == GROUP else (images, "all")
        if one.metric.unit in (GROUP, SET) and number < one.metric.at_least:
            raise ValueError(f"{one.metric.name} needs {one.metric.at_least} images or more in {where}, and there are {number}")
        if references < (least := one.metric.of_reference):
            raise ValueError(f"{one.metric.name} needs {least} reference images or more (--against), and there are {references}")
