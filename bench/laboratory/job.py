"""What a part draws, as data, so that its cost is known before; and the studio that draws it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from negengine import models
from negengine.diffusers.report import Report
from negengine.evaluate.draw import Variant, draw
from negengine.evaluate.groups import Drawn
from negengine.evaluate.protocols import Diversity

from . import kept

GROUPS_A_CALL = 3
ANCESTRAL = "EulerAncestralDiscreteScheduler"
Watch = Callable[[str, Sequence[Report]], object]


@dataclass(frozen=True)
class Size:
    """How much is drawn.

    Attributes:
        seeds: of the whole. images: of a group. steps: of the sampler; None: those of the model's preset.
        prompts: at most so many of a part's prompts.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    images: int = 4
    steps: int | None = None
    prompts: int | None = None

    def of(self, prompts: Sequence[str]) -> tuple[str, ...]:
        return tuple(prompts[: self.prompts])


FULL = Size()
QUICK = Size(seeds=(0, 1), images=2, steps=2, prompts=2)


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """The same prompts and noise by several variants; the first is the base.

    Attributes:
        scheduler: a class of diffusers in place of the model's own. call: arguments of every variant's call.
        rows: variant -> rows of the denoiser's batch that an image takes, of those without a method; for the budget. 1 if left out.
    """

    name: str
    model: str
    prompts: tuple[str, ...]
    variants: tuple[Variant, ...]
    size: Size
    scheduler: str | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, float] = field(default_factory=dict)

    @property
    def protocol(self) -> Diversity:
        return Diversity(prompts=self.prompts, images=self.size.images, seeds=self.size.seeds, metrics=("as-prompted",))

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call."""
        call = models.preset(self.model).call_kwargs()
        if isinstance(call.get("negative_prompt"), list):
            call["negative_prompt"] = call["negative_prompt"][0]
        steps = {} if self.size.steps is None else {"num_inference_steps": self.size.steps}
        return {**call, **self.call, **steps}

    @property
    def images(self) -> int:
        return len(self.prompts) * self.size.images * len(self.size.seeds) * len(self.variants)

    @property
    def cost(self) -> float:
        """Images without a method at the preset's steps that take as long."""
        each = self.images / len(self.variants) * self.arguments["num_inference_steps"] / models.preset(self.model).steps
        return each * sum(self.rows.get(variant.name, 1.0) for variant in self.variants)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: with other settings the pictures are others."""
        seed = self.size.seeds[0]
        return {
            "model": self.model,
            "weights": weights(self.model),
            "scheduler": self.scheduler,
            "prompts": list(self.prompts),
            "size": dataclasses.asdict(self.size),
            "call": self.arguments,
            "variants": {one.name: one.plain(seed, self.prompts[:GROUPS_A_CALL]) for one in self.variants},
        }

    @property
    def digest(self) -> str:
        """Of all that decides what is drawn."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True, default=str).encode()).hexdigest()[:24]


def weights(model: str) -> str:
    """What tells a model's weights from others: a digest of its manifest."""
    return hashlib.sha256((models.path(model) / "manifest.json").read_bytes()).hexdigest()[:16]


class Studio:
    """Pipelines, loaded once, with the samplers that jobs ask for.

    Args:
        folder: where the pictures of a job are kept, and taken from when the same job is drawn again; None: nowhere.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._pipes: dict[str, tuple[Any, Any]] = {}

    def pipe(self, model: str, scheduler: str | None = None) -> Any:
        import diffusers

        if model not in self._pipes:
            pipe = models.load(model)
            self._pipes[model] = pipe, pipe.scheduler
        pipe, own = self._pipes[model]
        pipe.scheduler = own if scheduler is None else getattr(diffusers, scheduler).from_config(own.config)
        return pipe

    def draw(self, job: Job, drawn: Callable[[int], object] = lambda images: None, watch: Watch | None = None) -> list[Drawn]:
        """All variants of a job.

        Args:
            drawn: called with the number of images after each group.
            watch: as that of :func:`negengine.evaluate.draw.draw`; what is watched is always drawn anew.
        """
        if watch is not None:
            return self._draw(job, drawn, watch)
        file = None if self._folder is None else self._folder / f"{job.digest}.pt"
        if file is not None and file.exists():
            drawn(job.images)
            return kept.load(file)
        found = self._draw(job, drawn, lambda variant, reports: None)
        if file is not None:
            kept.save(found, file)
        return found

    def _draw(self, job: Job, drawn: Callable[[int], object], watch: Watch) -> list[Drawn]:
        return draw(
            self.pipe(job.model, job.scheduler),
            job.protocol,
            job.variants,
            job.arguments,
            GROUPS_A_CALL,
            lambda variant, group: drawn(len(group.images)),
            watch,
        )

    def seconds(self, model: str) -> float:
        """Measured seconds an image without a method, once warm, in groups as jobs draw them."""
        warm = Job(name="warm", model=model, prompts=("a cook",), variants=(Variant(name="without"),), size=Size((0,), 1, 1))
        job = dataclasses.replace(warm, prompts=("a cook", "a judge", "a pilot"), size=Size((0,), 4))
        self.draw(warm)
        begun = time.perf_counter()
        self.draw(job)
        return (time.perf_counter() - begun) / job.images
