"""Part a. NegToMe on people-flux: do the images of a prompt differ more in gender, tone and style, and what does it cost?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from negengine import NegToMe, models
from negengine.evaluate import people
from negengine.evaluate.draw import Variant
from negengine.evaluate.groups import Drawn
from negengine.metrics import frechet_distance
from negengine.models.people.attributes import PROFESSIONS
from negengine.models.people.measure import SEED_OF_THE_WORLD, world_pictures
from negengine.models.people.prompts import PROMPTS, named

from .job import Job, Size, Studio
from .numbers import DIVERSITY, FIDELITY, Reading, measured, rows_of

TITLE = "NegToMe: diversity against fidelity"
WATCHED = ()
MANY, FEW = (tuple(PROMPTS[k * len(PROMPTS) // number] for k in range(number)) for number in (12, 8))
TIMES = (0.5, 1.0, 2.0)  # of the preset's alpha
SCALES = (1.0, 2.0, 3.0, 5.0, 8.0)  # of classifier-free guidance


def jobs(size: Size) -> list[Job]:
    flux = models.negtome_preset("people-flux")
    return [
        Job(name="flux", model="people-flux", prompts=size.of(MANY), variants=modes(flux), size=size),
        Job(name="alpha", model="people-flux", prompts=size.of(FEW), variants=_alphas(flux), size=size),
        Job(name="guidance", model="people-flux", prompts=size.of(FEW), variants=_scales(flux), size=size),
    ]


def modes(preset: NegToMe) -> tuple[Variant, ...]:
    """The reference images, and the matching of the published code."""
    paper = [(mode, dataclasses.replace(preset, reference=mode)) for mode in ("others", "first", "previous")]
    release = dataclasses.replace(preset, reference="first", matching="release")
    return (Variant(name="without"), *(always(f"negtome {name}", one) for name, one in [*paper, ("first, release", release)]))


def _alphas(preset: NegToMe) -> tuple[Variant, ...]:
    kinds = (("others", "paper"), ("first", "paper"), ("first", "release"))
    assert isinstance(preset.alpha, float)
    alphas = [round(times * preset.alpha, 3) for times in TIMES]
    return (
        Variant(name="without"),
        *(
            always(f"{mode}, {matching}, {alpha:g}", dataclasses.replace(preset, reference=mode, matching=matching, alpha=alpha))
            for mode, matching in kinds
            for alpha in alphas
        ),
    )


def _scales(preset: NegToMe) -> tuple[Variant, ...]:
    found = []
    for scale in SCALES:
        call = {"true_cfg_scale": scale}
        found += [Variant(name=f"without, {scale:g}", call=call), always(f"negtome, {scale:g}", preset, call)]
    return tuple(found)


def always(name: str, method: Any, call: Mapping[str, Any] | None = None) -> Variant:
    seeded = any(field.name == "seed" for field in dataclasses.fields(method))
    return Variant(name=name, methods=lambda seed: [dataclasses.replace(method, seed=seed) if seeded else method], call=call or {})


def numbers(job: Job, drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """Diversity within groups; fidelity; FID to all looks of these professions, and to the biased world that was taught."""
    professions = [named(str(group.prompt))[0] for group in drawn[0].groups for _ in group.images]
    asked = {PROFESSIONS[profession] for profession in professions}
    images = [image for image, words in zip(*people.real_people(), strict=True) if words[0] in asked]
    rows = measured(drawn, (*DIVERSITY, "vendi", *FIDELITY), reference=images)
    reading = Reading(drawn)
    world = reading.features(world_pictures(professions, SEED_OF_THE_WORLD))
    return rows + rows_of("fid biased", reading.by_seed(lambda read, seen, groups: float(frechet_distance(seen, world))))


def measure(studio: Studio, jobs: Sequence[Job], told: dict[str, Any], drawn: Callable[[int], object]) -> None:
    """Draw every job and add its rows to ``told``."""
    for job in jobs:
        told["rows"] += [row | {"job": job.name} for row in numbers(job, studio.draw(job, drawn))]
