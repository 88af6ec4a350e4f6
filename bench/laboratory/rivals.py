"""Part rivals. NegToMe on people-sdxl, where every rival works without a detour: beside CADS, seed variance and others."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

from negengine import CADS, GuidanceInterval, NegToMe, SeedVariance, models
from negengine.evaluate import people
from negengine.evaluate.draw import Variant
from negengine.models.people.attributes import PROFESSIONS
from negengine.models.people.prompts import named

from .diversity import MANY, always, modes, numbers
from .job import Job, Size, Studio

TITLE = "NegToMe beside its rivals"
WATCHED = ()
MODEL = "people-sdxl"


def jobs(size: Size) -> list[Job]:
    preset = models.negtome_preset(MODEL)
    variants = (*modes(preset), *_rivals(preset, size.images))
    return [Job(name="sdxl", model=MODEL, prompts=size.of(MANY), variants=variants, size=size)]


def _rivals(preset: NegToMe, images: int) -> tuple[Variant, ...]:
    """At two strengths each, since one may be too weak for a small model and another too strong."""
    cads = [always(f"CADS {scale:g}", CADS(scale=scale)) for scale in (0.25, 1.0)]
    noise = [always(f"seed variance {strength:g}", SeedVariance(strength=strength)) for strength in (1.0, 3.0)]
    interval = always("guidance interval", GuidanceInterval(low=0.3, high=5.0))
    rewriting = Variant(name="rewriting", rewrite=rewritten)
    grouped = dataclasses.replace(preset, group_size=images)  # every image has its own prompt: which belong together is told
    both = Variant(name="rewriting + negtome", rewrite=rewritten, methods=lambda seed: [grouped])
    return (*cads, *noise, interval, rewriting, both)


def rewritten(prompt: str, images: int) -> Sequence[str]:
    """Prompts that name a look of its own for each image, as a person or a language model would write them."""
    profession = PROFESSIONS[named(prompt)[0]]
    looks = random.Random(prompt).sample(people.LOOKS, images)
    return [people.sentence(profession, *look) for look in looks]


def measure(studio: Studio, jobs: Sequence[Job], told: dict[str, Any], drawn: Callable[[int], object]) -> None:
    """Draw every job and add its rows to ``told``."""
    for job in jobs:
        told["rows"] += [row | {"job": job.name} for row in numbers(job, studio.draw(job, drawn))]
