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
from .removal import DNG, STRONG, guided_as, plain_call

TITLE = "Two methods at once"
WATCHED = ()
FEW_STEPS = 4


def jobs(size: Size) -> list[Job]:
    few = dataclasses.replace(size, steps=min(size.steps or FEW_STEPS, FEW_STEPS))
    return [*(_with_dng(model, size) for model in models.PEOPLE), _with_nag("people-flux", few)]


def _with_dng(model: str, size: Size) -> Job:
    def dng(texts: tuple[str, ...]) -> list[Method]:
        return [guided_as(model, dataclasses.replace(DNG, scale=STRONG), texts)]

    return Job(name=f"DNG, {model}", model=model, prompts=size.of(PROMPTS), variants=_four("DNG", model, dng), size=size,
               scheduler=ANCESTRAL if model == "people-sdxl" else None, rows={"DNG": 1.5, "negtome + DNG": 1.5})  # fmt: skip


def _with_nag(model: str, size: Size) -> Job:
    def nag(texts: tuple[str, ...]) -> list[Method]:
        return [NormalizedAttentionGuidance(negative_prompt=texts)]

    return Job(name=f"NAG, {model}", model=model, prompts=size.of(PROMPTS), variants=_four("NAG", model, nag), size=size,
               call=plain_call(model), rows={"NAG": 1.5, "negtome + NAG": 1.5})  # fmt: skip


def _four(name: str, model: str, method: Any) -> tuple[Variant, ...]:
    """None, each, and both."""
    preset = models.negtome_preset(model)
    call = plain_call(model)  # with it, where the method guides in one batch
    return (
        Variant(name="without"),
        Variant(name="negtome", methods=lambda seed: [preset]),
        Variant(name=name, of_prompts=away(method), call=call),
        Variant(name=f"negtome + {name}", methods=lambda seed: [preset], of_prompts=away(method), call=call),
    )


def numbers(job: Job, drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    return [*removal_rows(drawn), *measured(drawn, (*DIVERSITY, "vendi"))]


def measure(studio: Studio, jobs: Sequence[Job], told: dict[str, Any], drawn: Callable[[int], object]) -> None:
    """Draw every job and add its rows to ``told``."""
    for job in jobs:
        told["rows"] += [row | {"job": job.name} for row in numbers(job, studio.draw(job, drawn))]
