"""Part d. DNP: is all that a prompt names read more often, away from what the model itself draws as its opposite?"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

from negengine import DiffusionNegativePrompt
from negengine.evaluate import measure as laboratory
from negengine.evaluate import people
from negengine.evaluate.asked import asked_for, load_all
from negengine.evaluate.draw import Variant
from negengine.evaluate.groups import Drawn
from negengine.evaluate.measure import Beside
from negengine.evaluate.pairs import pair_tables
from negengine.evaluate.prompting import STANDARD, chosen_by_seed
from negengine.evaluate.protocols import Pairs
from negengine.models.people.attributes import ATTRIBUTES
from negengine.models.people.prompts import named

from .job import Job, Size, Studio
from .numbers import Reading, of_laboratory, rows_of

TITLE = "DNP: four negative prompts"
WATCHED = ()
MODEL = "people-flux"
OPPONENTS = ("opposite", "random", "standard")
CORRECTNESS, QUALITY = "prompt-probability:people-everything", "reference-distance"


def opposite(prompt: str, seed: int) -> str:
    """What a person would write: the same profession with another gender, tone and style."""
    values = list(ATTRIBUTES.values())
    told = named(prompt)
    other = [values[k][(told[k] + 1 + seed % (len(values[k]) - 1)) % len(values[k])] for k in (1, 2, 3)]
    return people.sentence(values[0][told[0]], *other)


def any_other(prompt: str, seed: int) -> str:
    """Some sentence of the world, chosen by the image's seed."""
    return random.Random(seed).choice([text for text in people.EVERYTHING if text != prompt])


def jobs(size: Size) -> list[Job]:
    captioner = people.PeopleCaptioner()
    variants = (
        Variant(name="without"),
        Variant(name="opposite", negative=opposite),
        Variant(name="random", negative=any_other),
        Variant(name="standard", negative=chosen_by_seed(STANDARD)),
        Variant(name="dnp", dnp=DiffusionNegativePrompt(captioner=captioner)),
    )
    smaller = dataclasses.replace(size, images=min(size.images, 2))
    return [Job(name="pairs", model=MODEL, prompts=size.of(people.COMPLETE), variants=variants, size=smaller, rows={"dnp": 2.0})]


def numbers(job: Job, drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """Probability of all that the prompt names, distance to real pictures, and how often each attribute is read as named."""
    rows = [of_laboratory(row) for row in _measured(drawn)]
    reading = Reading(drawn)
    for place, attribute in enumerate(ATTRIBUTES):
        values = reading.by_group(
            lambda group, read, place=place: float((read[:, place] == named(str(group.prompt))[place]).double().mean())  # type: ignore[misc]
        )
        rows += rows_of(f"{attribute} as prompted", values)
    return rows


def _measured(drawn: Sequence[Drawn]) -> list[Any]:
    texts = (CORRECTNESS, f"{QUALITY}:{people.READER}", "as-prompted:people-everything")
    asked = asked_for(texts, people.READER, people.READER)
    expected = {one.name: [str(group.prompt) for group in one.groups for _ in group.images] for one in drawn}
    beside = Beside(base=drawn[0].name, expected={"people-everything": expected}, reference=people.real_people()[0])
    return laboratory.measure(drawn, asked, load_all(asked, "cpu", ()), beside)


def tables(job: Job, drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """The supplement's pairs of tables: which picture of a prompt and seed is best, or is there no clear winner?"""
    rows = _measured(drawn)
    found = []
    for variants in (("without", "dnp"), *(("without", one, "dnp") for one in OPPONENTS)):
        protocol = Pairs(
            prompts=job.prompts, variants=variants, correctness=CORRECTNESS, quality=QUALITY, metrics=(CORRECTNESS, QUALITY)
        )
        found += [dataclasses.asdict(table) for table in pair_tables(rows, protocol)]
    return found


def measure(studio: Studio, jobs: Sequence[Job], told: dict[str, Any], drawn: Callable[[int], object]) -> None:
    """Draw, add the rows and the pairs of tables to ``told``."""
    (job,) = jobs
    pictures = studio.draw(job, drawn)
    told["rows"] += [row | {"job": job.name} for row in numbers(job, pictures)]
    told["pairs"] = tables(job, pictures)
