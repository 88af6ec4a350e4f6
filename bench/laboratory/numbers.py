"""From pictures to rows: a mean with its interval, and the difference from the base with its own, for each variant and metric."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from negengine.evaluate import people
from negengine.evaluate.asked import asked_for, load_all
from negengine.evaluate.groups import Drawn, Group
from negengine.evaluate.measure import Beside, Row, class_in, measure
from negengine.evaluate.protocols import prompt_of
from negengine.metrics.intervals import Interval, difference_interval, mean_interval, share_interval, units_of
from negengine.metrics.registry import METRICS
from negengine.models import load_classifier

Values = Mapping[str, float]
DIVERSITY = (
    "label-entropy:people-gender",
    "label-entropy:people-tone",
    "label-entropy:people-style",
    "distinct:people-look",
)
FIDELITY = ("as-prompted", "reference-distance", "fid")


def measured(drawn: Sequence[Drawn], metrics: Sequence[str], **beside: Any) -> list[dict[str, Any]]:
    """Rows of metrics of the laboratory; the first variant is the base.

    Args:
        beside: as fields of ``Beside``.
    """
    asked = asked_for(metrics, people.READER, people.READER)
    extractors = load_all(asked, "cpu", ())
    expected = {}
    for reader in (one.extractor for one in asked if "expected" in one.metric.needs):
        classes = extractors[str(reader)].classes
        of_each = {one.name: [_asked(group, classes) for group in one.groups for _ in group.images] for one in drawn}
        if all(all(words) for words in of_each.values()):
            expected[str(reader)] = of_each
    rows = measure(drawn, asked, extractors, Beside(base=drawn[0].name, expected=expected, **beside))
    return [of_laboratory(row) for row in rows]


def _asked(group: Group, classes: Sequence[str]) -> str:
    return class_in(str(group.prompt), classes) or ""


def of_laboratory(row: Row) -> dict[str, Any]:
    return plain(row.variant, row.metric.replace(f":{people.READER}", ""), row.values, row.interval, row.difference)


def plain(variant: str, metric: str, values: Values, interval: Interval | None, difference: Interval | None) -> dict[str, Any]:
    return {
        "variant": variant,
        "metric": metric,
        **(dict.fromkeys(("mean", "low", "high"), None) if interval is None else _rounded(interval)),
        "difference": None if difference is None else _rounded(difference),
        "values": {key: round(value, 4) for key, value in values.items()},
    }


def _rounded(interval: Interval) -> dict[str, float | None]:
    return {key: None if value is None else round(value, 5) for key, value in dataclasses.asdict(interval).items()}


def rows_of(metric: str, by_variant: Mapping[str, Values]) -> list[dict[str, Any]]:
    """Rows of values of one's own: variant -> key -> value, the base first; paired by their keys."""
    base: Values | None = None
    rows = []
    for variant, values in by_variant.items():
        interval = (share_interval if is_share(metric) else mean_interval)(_independent(values)).within(*possible(metric))
        difference = None
        if base is not None:
            difference = paired(values, base)
        base = values if base is None else base
        if is_share(metric):
            difference = difference and difference.within(-1, 1)
        rows.append(plain(variant, metric, values, interval, difference))
    return rows


def paired(values: Values, base: Values) -> Interval:
    """The difference of what both have."""
    common = [key for key in base if key in values]
    return difference_interval(*(_independent({key: one[key] for key in common}) for one in (values, base)), paired=True)


def _independent(values: Values) -> NDArray[np.float64]:
    """As the laboratory does: means of prompts, where there are enough of them; else of groups, or of seeds."""
    return np.array(list(units_of(values, {key: prompt_of(key) for key in values})[0].values()))


def possible(metric: str) -> tuple[float | None, float | None]:
    """The least and the greatest value; None: no bound that is known."""
    if is_share(metric):
        return 0, 1
    known = METRICS.get(metric.partition(":")[0].partition(" ")[0])
    return (None, None) if known is None else (known.least, None if callable(known.most) else known.most)


def is_share(metric: str) -> bool:
    """Whether a metric lies between 0 and 1 and is shown in per cent."""
    return metric.startswith(("forbidden", "as-prompted")) or metric.endswith("as prompted")


def pooled(parts: Iterable[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several measurements as one: their values together, where they have other keys."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for rows in parts:
        for row in rows:
            values = found.setdefault(row["metric"], {}).setdefault(row["variant"], {})
            twice = values.keys() & row["values"].keys()
            if twice:
                raise ValueError(f"{sorted(twice)[0]} is measured twice")
            values.update(row["values"])
    return [row for metric, by_variant in found.items() for row in rows_of(metric, by_variant)]


class Reading:
    """Profession, gender, tone and style of every image, read once: ``[N, 4]`` for each variant."""

    def __init__(self, drawn: Sequence[Drawn]) -> None:
        self.drawn = drawn
        self._judge = load_classifier(name=people.READER)
        with torch.no_grad():
            self.labels = {one.name: self._judge.read(one.images) for one in drawn}
            self._features = {one.name: self._judge.features(one.images) for one in drawn}

    def by_group(self, value: Callable[[Group, Tensor], float]) -> dict[str, dict[str, float]]:
        """Variant -> group -> a number, from the group and its labels ``[images, 4]``."""
        return {one.name: {group.key: value(group, labels) for group, labels in self.groups(one)} for one in self.drawn}

    def groups(self, one: Drawn) -> list[tuple[Group, Tensor]]:
        sizes = [len(group.images) for group in one.groups]
        return list(zip(one.groups, self.labels[one.name].split(sizes), strict=True))

    def by_seed(self, value: Callable[[Tensor, Tensor, list[Group]], float]) -> dict[str, dict[str, float]]:
        """Variant -> seed -> a number, from the labels and features of the seed's images, and its groups."""
        found: dict[str, dict[str, float]] = {}
        for one in self.drawn:
            labels, features = self.labels[one.name], self._features[one.name]
            found[one.name] = {
                f"seed {seed}": value(labels[list(of.rows)], features[list(of.rows)], list(of.part.groups))
                for seed, of in one.by_seed().items()
            }
        return found

    def features(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        with torch.no_grad():
            return self._judge.features(images)
