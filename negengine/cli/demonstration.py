"""What the demo shows of an embedded model, drawn and measured by the quality laboratory."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from negengine import models
from negengine.cli.sheet import Row
from negengine.evaluate.asked import asked_for, load_all
from negengine.evaluate.draw import Variant, draw
from negengine.evaluate.groups import Drawn
from negengine.evaluate.measure import Beside, class_in, measure
from negengine.evaluate.protocols import Diversity, Protocol
from negengine.evaluate.worlds import World, world_of
from negengine.methods import NegToMe, ReferenceImage

GROUP = 4
GROUPS_A_CALL = 5
CHARACTER = "firefighter"
CHARACTER_GROUPS = 3


@dataclass(frozen=True, eq=False)
class Shown:
    """One part of the demo.

    Attributes:
        name: in the JSON. title, about: above the picture. heads: above its two columns. rows: of the picture.
        numbers: variants, metrics (means, and intervals of the differences from the first variant), settings, seconds.
    """

    name: str
    title: str
    heads: tuple[str, str]
    rows: list[Row]
    numbers: Mapping[str, Any]
    about: str = ""


Advance = Callable[[int, int], None]  # told how many groups are drawn, and how many there will be


def has_characters(name: str) -> bool:
    """Whether a model's world has pictures in this package to keep away from."""
    return name in models.PEOPLE


def differ(name: str, pipe: Any, groups: int, seed: int, advance: Advance) -> Shown:
    """Groups of four images of a prompt, without and with NegToMe."""
    world = _world(name)
    protocol = Diversity(
        prompts=_evenly(world.prompts, groups),
        images=GROUP,
        seeds=(seed,),
        metrics=(*world.diversity, "vendi", "as-prompted"),
    )
    variants = [
        Variant(name="without"),
        Variant(name="with NegToMe", methods=lambda seed: [models.negtome_preset(name)]),
    ]
    drawn, seconds = _drawn(name, pipe, protocol, variants, advance)
    numbers = _numbers(name, world, protocol, drawn, seconds)
    notes = _distinct(numbers)
    rows = [
        Row(str(plain.prompt), plain.images, merged.images, note=note)
        for plain, merged, note in zip(drawn[0].groups, drawn[1].groups, notes, strict=True)
    ]
    title = f"{name}: the same seeds, without and with NegToMe"
    about = "a look: gender, skin tone and style of drawing, as a classifier reads them" if any(notes) else ""
    return Shown("differ", title, ("without", "with NegToMe, the same seeds"), rows, numbers, about)


def away(name: str, pipe: Any, groups: int, seed: int, advance: Advance) -> Shown:
    """A prompt whose images are pushed away from a given picture, and from a part of it."""
    from negengine.evaluate.people import character

    world, person = _world(name), character(CHARACTER)
    protocol = Diversity(
        prompts=(person.prompt,),
        images=GROUP,
        repeats=CHARACTER_GROUPS,
        seeds=(seed,),
        metrics=("asset-similarity", "asset-correlation", "as-prompted"),
    )
    preset = models.negtome_preset(name)
    variants = [Variant(name="without")] + [
        Variant(name=label, methods=lambda seed, mask=mask: [_away_from(preset, person.picture, mask)])  # type: ignore[misc]
        for label, mask in (("away from the picture", None), ("away from its head", person.mask))
    ]
    drawn, seconds = _drawn(name, pipe, protocol, variants, advance)
    numbers = _numbers(name, world, protocol, drawn, seconds, person.picture)
    plain, whole, part = (variant.groups[0].images for variant in drawn)
    rows = [
        Row("away from this picture", plain, whole, pictures=(person.picture,)),
        Row("away from its head: the mask's white", plain, part, pictures=(person.picture, person.mask)),
    ]
    title = f'{name}: "{person.prompt}", away from a given picture'
    return Shown("away", title, ("without", "away from the picture, the same seeds"), rows, numbers)


def _world(name: str) -> World:
    world = world_of(name)
    assert world is not None
    return world


def _away_from(preset: NegToMe, picture: Image.Image, mask: Image.Image | None) -> NegToMe:
    return dataclasses.replace(preset, reference=ReferenceImage(picture, mask))


def _evenly(prompts: Sequence[str], number: int) -> tuple[str, ...]:
    number = min(number, len(prompts))
    return tuple(prompts[k * len(prompts) // number] for k in range(number))


def _drawn(
    name: str, pipe: Any, protocol: Protocol, variants: Sequence[Variant], advance: Advance
) -> tuple[list[Drawn], dict[str, float]]:
    """Every variant, and the seconds that it took."""
    total, done = len(variants) * len(protocol.prompts) * protocol.repeats, itertools.count(1)
    call = models.preset(name).call_kwargs()
    if isinstance(call.get("negative_prompt"), list):
        call["negative_prompt"] = call["negative_prompt"][0]
    drawn, seconds = [], {}
    for variant in variants:
        begun = time.perf_counter()
        drawn += draw(pipe, protocol, [variant], call, GROUPS_A_CALL, lambda variant, group: advance(next(done), total))
        seconds[variant.name] = time.perf_counter() - begun
    return drawn, seconds


def _numbers(
    name: str,
    world: World,
    protocol: Protocol,
    drawn: Sequence[Drawn],
    seconds: Mapping[str, float],
    asset: Image.Image | None = None,
) -> dict[str, Any]:
    asked = asked_for(protocol.metrics, world.reader, world.reader)
    extractors = load_all(asked, "cpu", ())
    classes = extractors[world.reader].classes
    expected = [str(class_in(str(group.prompt), classes)) for group in drawn[0].groups for _ in group.images]
    base = drawn[0].name
    beside = Beside(base=base, expected={world.reader: {variant.name: expected for variant in drawn}}, asset=asset)
    rows = measure(drawn, asked, extractors, beside)
    metrics: dict[str, Any] = {}
    for one in asked:
        of_metric = {row.variant: row for row in rows if row.metric == one.key}
        metrics[one.key] = {
            "about": {"title": _title(one.metric.title, one.extractor, world), "percent": one.metric.percent},
            "mean": {variant: row.interval.mean for variant, row in of_metric.items() if row.interval is not None},
            "difference": {
                variant: dataclasses.asdict(row.difference) for variant, row in of_metric.items() if row.difference is not None
            },
            "groups": {variant: list(row.values.values()) for variant, row in of_metric.items()},
        }
    return {
        "about": f"{len(drawn[0].groups)} groups of {GROUP} images",
        "images": len(drawn[0].images),
        "variants": [variant.name for variant in drawn],
        "metrics": metrics,
        "seconds": dict(seconds),
        "reports": {variant.name: list(variant.about["reports"]) for variant in drawn},
        "methods": {variant.name: variant.about["methods"] for variant in drawn},
        "call": models.preset(name).call_kwargs(),
    }


def _title(title: str, extractor: str | None, world: World) -> str:
    """With what is read, where that is not what the model's own reader sees."""
    return title if extractor in (None, world.reader) else f"{title}: {str(extractor).partition('-')[2]}"


def _distinct(numbers: Mapping[str, Any]) -> list[str]:
    """For each row, how many different looks are read without and with."""
    found = next((metric["groups"] for key, metric in numbers["metrics"].items() if key.startswith("distinct:")), None)
    if found is None:
        return [""] * (numbers["images"] // GROUP)
    return [f"without: {_looks(before)}\nwith: {_looks(after)}" for before, after in zip(*found.values(), strict=True)]


def _looks(number: float) -> str:
    return f"{number:.0f} look{'s' * (number > 1)}"
