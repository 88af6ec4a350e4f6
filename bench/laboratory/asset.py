"""Part b. Away from a given character: how alike are the pictures to it, prompted to draw just that?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from negengine import NegativePrompting, NegToMe, NormalizedAttentionGuidance, ReferenceImage, models
from negengine.evaluate import people
from negengine.evaluate.draw import Variant
from negengine.evaluate.groups import Drawn

from .job import Job, Size, Studio
from .numbers import measured, pooled

TITLE = "Away from a given character"
WATCHED = ()
CHARACTERS = ("firefighter", "judge", "singer", "police officer")
PROMPTED = {"profession": "prompt", "everything": "complete"}  # what a prompt names -> a field of Character
STRENGTHS = (1.0, 2.0)  # of NegToMe's preset


def jobs(size: Size) -> list[Job]:
    found = []
    for profession in CHARACTERS[: size.prompts]:
        person = people.character(profession)
        for names, field in PROMPTED.items():
            for model in models.PEOPLE:
                variants = _away(person, models.negtome_preset(model))
                if model == "people-sdxl":
                    variants += _negative(person)
                one = f"{model}, {names}, {profession}"
                rows = {"negative prompting": 1.5, "NAG": 1.3}
                prompt = (getattr(person, field),)
                found.append(Job(name=one, model=model, prompts=prompt, variants=variants, size=size, rows=rows))
    return found


def _away(person: people.Character, preset: NegToMe) -> tuple[Variant, ...]:
    assert isinstance(preset.alpha, float)
    found = [Variant(name="without")]
    for times in STRENGTHS:
        for label, mask in (("", None), (", its head", person.mask)):
            method = dataclasses.replace(preset, reference=ReferenceImage(person.picture, mask), alpha=times * preset.alpha)
            found.append(Variant(name=f"negtome {times:g}x{label}", methods=lambda seed, method=method: [method]))  # type: ignore[misc]
    return tuple(found)


def _negative(person: people.Character) -> tuple[Variant, ...]:
    """Away from the words that say the character."""
    away = NegativePrompting(prompt=person.complete, scale=1.0)
    nag = NormalizedAttentionGuidance(negative_prompt=person.complete)
    return (
        Variant(name="negative prompting", methods=lambda seed: [away]),
        Variant(name="NAG", methods=lambda seed: [nag]),
    )


def numbers(job: Job, drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """Similarity of features and of pixels to the character, share of its very look, fidelity."""
    profession = job.name.rpartition(", ")[2]
    person = people.character(profession)
    rows = measured(drawn, ("asset-similarity", "asset-correlation", "as-prompted", "reference-distance"), asset=person.picture,
                    reference=people.real_people()[0])  # fmt: skip
    look = ", ".join(people.ordinary(profession))
    return rows + measured(drawn, ("forbidden:people-look",), forbidden=look)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all characters together: a row for each model, kind of prompt, variant and metric."""
    kinds = dict.fromkeys(row["job"].rpartition(", ")[0] for row in rows)
    found = []
    for kind in kinds:
        of_kind = [row for row in rows if row["job"].rpartition(", ")[0] == kind]
        parts = [[row for row in of_kind if row["job"] == job] for job in dict.fromkeys(row["job"] for row in of_kind)]
        found += [row | {"job": kind} for row in pooled(parts)]
    return found


def measure(studio: Studio, jobs: Sequence[Job], told: dict[str, Any], drawn: Callable[[int], object]) -> None:
    """Draw every job and add its rows to ``told``."""
    for job in jobs:
        told["rows"] += [row | {"job": job.name} for row in numbers(job, studio.draw(job, drawn))]
    told["rows"] = summary(told["rows"])
