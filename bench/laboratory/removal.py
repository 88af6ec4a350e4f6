"""Part c. DNG: is a class absent, are the others as frequent as before, and does the guidance switch itself off?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from negengine import DynamicNegativeGuidance, NegativePrompting, SafeLatentDiffusion, models
from negengine.diffusers.report import DngReport, Report
from negengine.evaluate.draw import Variant
from negengine.evaluate.groups import Drawn
from negengine.models.people.attributes import STYLES

from .avoiding import PROMPTS, away, forbidden, removal_rows, with_style
from .job import ANCESTRAL, Job, Size, Studio
from .numbers import Reading

TITLE = "DNG: a style that is to be absent"
WATCHED = ("related", "unrelated")  # jobs whose reports are needed, too
Away = NegativePrompting | DynamicNegativeGuidance
STRONG = 10.0
DNG = DynamicNegativeGuidance(prompt="", prior=0.1, tau=0.125)
CONSTANT, DYNAMIC = (0.25, 0.5, 1.0, 2.0), (2.0, 5.0, STRONG, 20.0)
SAFE = ("weak", "medium", "strong", "max")
STEPS_OF_THE_PRESETS = 50  # for which SLD's warm-ups are made


def jobs(size: Size) -> list[Job]:
    return [job for model in models.PEOPLE for job in _of_model(model, size)]


def _of_model(model: str, size: Size) -> list[Job]:
    """The sweep, and DNG's estimate where it has something to find and where it has nothing."""
    prompts, one_seed = size.of(PROMPTS), dataclasses.replace(size, seeds=size.seeds[:1])
    others = tuple(with_style(prompt, STYLES[(STYLES.index(forbidden(prompt)) + 1) % len(STYLES)]) for prompt in prompts)
    variants = (without(model), *_constant(model), *_dynamic(model), *(_safe() if model == "people-sdxl" else ()))
    watched = (_dng(model, 0.0, "watched"), _dng(model, STRONG, "guided"))

    def job(name: str, prompts: tuple[str, ...], variants: tuple[Variant, ...], size: Size) -> Job:
        rows = {variant.name: 1.5 for variant in variants if variant.name != "without"}
        return Job(name=f"{name}, {model}", model=model, prompts=prompts, variants=variants, size=size, rows=rows,
                   scheduler=ANCESTRAL if model == "people-sdxl" else None, call=plain_call(model))  # fmt: skip

    return [
        job("removal", prompts, variants, size),
        job("related", prompts, watched, one_seed),
        job("unrelated", others, watched, one_seed),
    ]


def plain_call(model: str) -> dict[str, Any]:
    """FLUX's true CFG calls the denoiser twice, which methods that decide the prediction cannot follow: they guide in one batch."""
    return {"true_cfg_scale": 1.0} if model == "people-flux" else {}


def without(model: str) -> Variant:
    """The base, with the model's own guidance."""
    return Variant(name="without", call={"true_cfg_scale": models.preset(model).guidance} if model == "people-flux" else {})


def guided_as(model: str, method: Away, texts: tuple[str, ...]) -> Away:
    """A method with its prompts, and on FLUX with the model's guidance and the surrogate of DNG."""
    if model == "people-sdxl":
        return dataclasses.replace(method, prompt=texts)
    surrogate = {"surrogate": "ancestral"} if isinstance(method, DynamicNegativeGuidance) else {}
    return dataclasses.replace(method, prompt=texts, cfg=models.preset(model).guidance, **surrogate)


def _constant(model: str) -> list[Variant]:
    def at(scale: float) -> Variant:
        method = NegativePrompting(prompt="", scale=scale)
        return Variant(name=f"negative prompting {scale:g}", of_prompts=away(lambda texts: [guided_as(model, method, texts)]))

    return [at(scale) for scale in CONSTANT]


def _dynamic(model: str) -> list[Variant]:
    return [_dng(model, scale, f"DNG {scale:g}") for scale in DYNAMIC]


def _dng(model: str, scale: float, name: str) -> Variant:
    method = dataclasses.replace(DNG, scale=scale)
    return Variant(name=name, of_prompts=away(lambda texts: [guided_as(model, method, texts)]))


def _safe() -> list[Variant]:
    """The paper's four presets, their warm-ups for half the number of steps."""

    def of(preset: str) -> Variant:
        def methods(texts: tuple[str, ...]) -> list[SafeLatentDiffusion]:
            usual = SafeLatentDiffusion.preset(preset, prompt=texts)
            return [dataclasses.replace(usual, warmup=usual.warmup * 25 // STEPS_OF_THE_PRESETS)]

        return Variant(name=f"SLD {preset}", of_prompts=away(methods))

    return [of(preset) for preset in SAFE]


class Posterior:
    """Collects DNG's estimate, ``[steps + 1, images]`` for each variant."""

    def __init__(self) -> None:
        self._found: dict[str, list[Tensor]] = {}

    def __call__(self, variant: str, reports: Sequence[Report]) -> None:
        (report,) = reports
        assert isinstance(report, DngReport)
        self._found.setdefault(variant, []).append(torch.tensor(report.p))

    def of(self, variant: str) -> Tensor:
        return torch.cat(self._found[variant], 1)


def traces(studio: Studio, found: Sequence[Job], drawn: Any) -> dict[str, Any]:
    """Quantiles of the estimate over the steps: of the images that show what is to be avoided without guidance, and of the rest."""
    told: dict[str, Any] = {}
    for job in found:
        collected = Posterior()
        pictures = studio.draw(job, drawn, collected)
        for one in pictures:
            reading = Reading([pictures[0]])
            wrong = torch.tensor([STYLES.index(forbidden(str(group.prompt))) for group in one.groups for _ in group.images])
            member = reading.labels[pictures[0].name][:, 3] == wrong
            told[f"{job.name}, {one.name}"] = quantiles(collected.of(one.name), member)
    return told


def quantiles(posterior: Tensor, member: Tensor) -> dict[str, Any]:
    groups = {"show it": posterior[:, member], "do not": posterior[:, ~member]}
    levels = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
    return {
        name: {"images": group.shape[1]}
        | {level: torch.quantile(group.double(), at, dim=1).tolist() for level, at in levels.items()}
        for name, group in groups.items()
        if group.shape[1]
    }


def numbers(job: Job, drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    return removal_rows(drawn)


def measure(studio: Studio, jobs: Sequence[Job], told: dict[str, Any], drawn: Callable[[int], object]) -> None:
    """Draw, and add the rows and the traces of the posterior to ``told``."""
    swept = [job for job in jobs if not job.name.startswith(WATCHED)]
    for job in swept:
        told["rows"] += [row | {"job": job.name} for row in numbers(job, studio.draw(job, drawn))]
    told["posterior"] = traces(studio, [job for job in jobs if job not in swept], drawn)
