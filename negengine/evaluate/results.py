"""Results as JSON: one flat row a variant and metric, with everything that is needed to repeat them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from negengine.environment import machine, versions
from negengine.evaluate.asked import Asked
from negengine.evaluate.groups import Drawn
from negengine.evaluate.measure import Row
from negengine.evaluate.pairs import PairTable
from negengine.metrics.intervals import ENOUGH, LEVEL, PROMPTS, RESAMPLES

SCHEMA = 1
WHAT = "evaluate"
SCHEMA_FILE = Path(__file__).with_name("schema.json")
FEW_SEEDS = 3


def document(
    rows: Sequence[Row],
    drawn: Sequence[Drawn],
    asked: Sequence[Asked],
    settings: Mapping[str, Any],
    pairs: Sequence[PairTable] = (),
    remarks: Sequence[str] = (),
) -> dict[str, Any]:
    """All of it as JSON holds it.

    Args:
        settings: of the evaluation: protocol, model, call, seeds, folders.
    """
    told = {
        "schema": SCHEMA,
        "what": WHAT,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "interval": {
            "level": LEVEL,
            "resamples": RESAMPLES,
            "method": f"percentile bootstrap over prompts (of {PROMPTS} or more), else over groups, or over seeds for sets; "
            f"Student's t below {ENOUGH} values; Wilson's for shares that are all 0 or all 1",
        },
        "metrics": {one.key: _about(one) for one in asked},
        "variants": {variant.name: {**variant.about, **_counts(variant), **_texts(variant)} for variant in drawn},
        "rows": [_plain(row) for row in rows],
        "pairs": [asdict(table) for table in pairs],
        "remarks": [*remarks, *_remarks(drawn)],
    }
    return json.loads(json.dumps(told, default=str))


def write(told: Mapping[str, Any], path: Path) -> None:
    """The file appears whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A result file, checked against ``schema.json``.

    Raises:
        OSError: it cannot be read. ValueError: it is not JSON, has another schema, or a key that is missing or wrong.
        ImportError: jsonschema is not installed.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(told, dict) or told.get("what") != WHAT:
        raise ValueError(f"{path} is no result of `negengine evaluate`")
    if told.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} has schema {told.get('schema')!r}; this version of negengine reads schema {SCHEMA}: evaluate anew"
        )
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise ImportError("reading result files needs the package jsonschema: pip install 'negengine[bench]'") from error
    wrong = next(Draft202012Validator(json.loads(SCHEMA_FILE.read_text())).iter_errors(told), None)
    if wrong is not None:
        raise ValueError(f"{path}: {'.'.join(map(str, wrong.absolute_path))}: {wrong.message[:160]}")
    return told


def _about(one: Asked) -> dict[str, Any]:
    metric = one.metric
    return {
        "title": metric.title,
        "about": metric.about,
        "better": metric.better,
        "unit": metric.unit,
        "percent": metric.percent,
        "extractor": one.extractor,
        "library": metric.library or "negengine",
    }


def _counts(variant: Drawn) -> dict[str, Any]:
    return {
        "images": len(variant.images),
        "groups": len(variant.groups),
        "seeds": [seed for seed in variant.by_seed() if seed is not None],
    }


def _texts(variant: Drawn) -> dict[str, dict[str, str]]:
    """For each image the text and the negative prompt with which it was drawn, where they were chosen for it."""
    found: dict[str, dict[str, str]] = {"texts": {}, "negative_prompts": {}}
    for group in variant.groups:
        found["texts"] |= dict(zip(group.names, group.texts, strict=False))
        found["negative_prompts"] |= dict(zip(group.names, group.negative_prompts, strict=False))
    return {what: texts for what, texts in found.items() if texts}


def _plain(row: Row) -> dict[str, Any]:
    return {
        "variant": row.variant,
        "metric": row.metric,
        **({**dict.fromkeys(("mean", "low", "high")), "units": 0} if row.interval is None else asdict(row.interval)),
        "over": row.over,
        "difference": None if row.difference is None else _difference(row),
        "values": dict(row.values),
        "by_image": dict(row.by_image),
    }


def _difference(row: Row) -> dict[str, Any]:
    assert row.difference is not None
    return {**asdict(row.difference), "paired": row.paired, "pairs": row.pairs, "over": row.difference_over}


def _remarks(drawn: Sequence[Drawn]) -> list[str]:
    seeds = {len([seed for seed in variant.by_seed() if seed is not None]) for variant in drawn}
    if max(seeds) < FEW_SEEDS:
        return ["There are fewer than three seeds: the intervals do not tell how much another seed would change."]
    return []
