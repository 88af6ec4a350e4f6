"""Part e. Two methods at once: NegToMe with DNG, and NegToMe with NAG at four steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from negengine import NormalizedAttentionGuidance, models
from negengine.evaluate.draw import Variant
from negengine.evaluate.groups import Drawn
from negengine.methods import Method

from .avoiding import PROMPTS, away, removal_rows
from .job import ANCESTRAL, Job, Size, Studio
from .numbers import DIVERSITY, measured
from .removal import DNG

TITLE = "Two methods at once"
WATCHED = ()
FEW_STEPS = 4


def _dng(texts: tuple[str, ...]) -> list[Method]:
    return [dataclasses.replace(DNG, prompt=texts, scale=10.0)]


def _nag(texts: tuple[str, ...]) -> list[Method]:
    return [NormalizedAttentionGuidance(negative_prompt=texts)]


def jobs(size: Size) -> list[Job]:
    few = dataclasses.replace(size, steps=min(size.steps or FEW_STEPS, FEW_STEPS))
    return [
        Job(name="DNG", model="people-sdxl", prompts=size.of(PROMPTS), variants=_four("DNG", "people-sdxl", _dng), size=size,
            scheduler=ANCESTRAL, rows={"DNG": 1.5, "negtome + DNG": 1.5}),
        Job(name="NAG", model="people-flux", prompts=size.of(PROMPTS), variants=_four("NAG", "people-flux", _nag), size=few,
            call={"true_cfg_scale": 1.0}, rows={"NAG": 1.5, "negtome + NAG": 1.5}),
    ]  # fmt: skip


def _four(name: str, model: str, method: Any) -> tuple[Variant, ...]:
    """None, each, and both."""
    preset = models.negtome_preset(model)
    return (
        Variant(name="without"),
        Variant(name="negtome", methods=lambda seed: [preset]),
        Variant(name=name, of_prompts=away(method)),
        Variant(name=f"negtome + {name}", methods=lambda seed: [preset], of_prompts=away(method)),
    )


def numbers(job: Job, drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    return [*removal_rows(drawn), *measured(drawn, (*DIVERSITY, "vendi"))]


def measure(studio: Studio, jobs: Sequence[Job], told: dict[str, Any], drawn: Callable[[int], object]) -> None:
    """Draw every job and add its rows to ``told``."""
    for job in jobs:
        told["rows"] += [row | {"job": job.name} for row in numbers(job, studio.draw(job, drawn))]
