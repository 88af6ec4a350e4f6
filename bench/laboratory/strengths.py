"""The gallery's pictures: every method at five strengths, a strip of four pictures for each prompt and seed."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from negengine import CADS, NegativePrompting, NegToMe, models
from negengine.evaluate import people
from negengine.evaluate.draw import Variant
from negengine.evaluate.groups import Drawn, Group
from negengine.models import load_classifier

from . import avoiding, removal
from .job import ANCESTRAL, Job, Size, Studio

TITLE = "Gallery"
WATCHED = ()
SEEDS = (0, 1)
QUALITY = 82  # of WebP
OPEN = tuple(people.sentence(name) for name in ("firefighter", "judge", "office worker", "singer"))
STYLED = avoiding.PROMPTS[:4]


@dataclass(frozen=True, eq=False)
class Dial:
    """A method and what its slider turns.

    Attributes:
        title, about: on the page. setting: its name. strengths: of the slider; the first is the picture without the method.
        at: strength -> the variant.
    """

    title: str
    about: str
    model: str
    setting: str
    strengths: tuple[float, ...]
    at: Callable[[float], Variant]
    prompts: tuple[str, ...] = OPEN
    scheduler: str | None = None


def dials() -> list[Dial]:
    return [dial for model in models.PEOPLE for dial in _of_model(model)]


def _of_model(model: str) -> list[Dial]:
    preset, sampler = models.negtome_preset(model), ANCESTRAL if model == "people-sdxl" else None
    away = "away from one of the three styles of drawing"
    found = [
        Dial(f"NegToMe, {model}", "Every picture is pushed away from the three others.", model, "alpha",
             _times(preset, 0, 0.5, 1, 1.5, 2), _negtome(preset)),
        Dial(f"Dynamic negative guidance, {model}", f"Only as far as a picture drifts there: {away}.", model, "scale",
             (0, 2, 5, 10, 20), _away(model, removal.DNG), STYLED, sampler),
        Dial(f"Negative prompting, {model}", f"Everywhere alike: {away}.", model, "scale", (0, 0.25, 0.5, 1, 2),
             _away(model, NegativePrompting(prompt="")), STYLED, sampler),
    ]  # fmt: skip
    if model == "people-sdxl":
        found.append(Dial(f"CADS, {model}", "Noise in the prompt's embedding, fading out.", model, "scale", (0, 0.1, 0.25, 0.5, 1),
             lambda scale: Variant(name=f"{scale:g}", methods=lambda seed: [CADS(scale=scale, seed=seed)])))  # fmt: skip
    return found


def _times(preset: NegToMe, *factors: float) -> tuple[float, ...]:
    assert isinstance(preset.alpha, float)
    return tuple(round(factor * preset.alpha, 3) for factor in factors)


def _negtome(preset: NegToMe) -> Callable[[float], Variant]:
    return lambda alpha: Variant(name=f"{alpha:g}", methods=lambda seed: [dataclasses.replace(preset, alpha=alpha)])


def _away(model: str, method: removal.Away) -> Callable[[float], Variant]:
    def at(scale: float) -> Variant:
        turned = dataclasses.replace(method, scale=scale)
        of_prompts = avoiding.away(lambda texts: [removal.guided_as(model, turned, texts)])
        return Variant(name=f"{scale:g}", of_prompts=of_prompts, call=removal.plain_call(model))

    return at


def jobs(size: Size) -> list[Job]:
    smaller = dataclasses.replace(size, seeds=tuple(seed for seed in SEEDS if seed in size.seeds))
    found = []
    for dial in dials():
        variants = (Variant(name="0"), *(dial.at(strength) for strength in dial.strengths[1:]))
        rows = {variant.name: 1.5 for variant in variants[1:]} if dial.prompts is STYLED else {}
        found.append(Job(name=dial.title, model=dial.model, prompts=size.of(dial.prompts), variants=variants, size=smaller,
                         scheduler=dial.scheduler, rows=rows))  # fmt: skip
    return found


def measure(studio: Studio, jobs: Sequence[Job], told: dict[str, Any], drawn: Callable[[int], object]) -> None:
    """Draw, and add the strips of every method to ``told``."""
    judge = load_classifier(name=people.READER)

    def read(images: Sequence[Image.Image]) -> list[str]:
        with torch.no_grad():
            return [", ".join(people.values_of(labels)) for labels in judge.read(images)]

    told["methods"] = [of_dial(dial, studio.draw(job, drawn), job.prompts, read) for dial, job in zip(dials(), jobs, strict=True)]


def of_dial(
    dial: Dial, drawn: Sequence[Drawn], prompts: Sequence[str], read: Callable[[Sequence[Image.Image]], list[str]]
) -> dict[str, Any]:
    """A method on the page: prompt -> seed -> strength -> a strip and what is read in it."""

    def at_each(prompt: str, seed: int | None) -> list[Mapping[str, Any]]:
        groups = [next(group for group in one.groups if (group.prompt, group.seed) == (prompt, seed)) for one in drawn]
        return [{"strip": strip(group), "read": read(group.images)} for group in groups]

    seeds = list(drawn[0].by_seed())
    avoids = dial.prompts is STYLED
    return {
        "title": dial.title,
        "about": dial.about,
        "setting": dial.setting,
        "strengths": list(dial.strengths),
        "prompts": [
            {
                "prompt": prompt,
                "avoid": avoiding.forbidden(prompt) if avoids else None,
                "seeds": [{"seed": seed, "at": at_each(prompt, seed)} for seed in seeds],
            }
            for prompt in prompts
        ],
    }


def strip(group: Group) -> str:
    """The pictures of a group beside each other, as WebP in base64."""
    width, height = group.images[0].size
    page = Image.new("RGB", (width * len(group.images), height), "white")
    for place, image in enumerate(group.images):
        page.paste(image, (place * width, 0))
    buffer = io.BytesIO()
    page.save(buffer, "WEBP", quality=QUALITY, method=6)
    return base64.b64encode(buffer.getvalue()).decode()
