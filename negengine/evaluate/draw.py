"""A pipeline at work: every group of a protocol, by every variant, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from negengine.diffusers.apply import apply, remove, status
from negengine.diffusers.dnp import diffusion_negative_prompting
from negengine.diffusers.report import Report
from negengine.evaluate.groups import Drawn, Group
from negengine.evaluate.protocols import Case, Protocol
from negengine.methods import DiffusionNegativePrompt, Method, NegToMe
from negengine.methods.plain import as_plain

Rewrite = Callable[[str, int], Sequence[str]]  # prompt and number of images -> a prompt for each
Negative = Callable[[str, int], str]  # prompt and seed of an image -> a negative prompt


@dataclass(frozen=True, eq=False, kw_only=True)
class Variant:
    """One way to draw the same prompts from the same noise.

    Attributes:
        name: in results.
        methods: seed of a call of the pipeline -> the methods that act in it.
        of_prompts: the same from the seed and the prompts of the call, where they depend on the prompts; else None.
        call: arguments of the pipeline's call in place of the common ones.
        rewrite: the prompts of a group; None: its own for every image.
        negative: the negative prompt of an image; None: that of the call.
        dnp: draws with the negative prompt that the model itself suggests; None: does not.
    """

    name: str
    methods: Callable[[int], Sequence[Method]] = lambda seed: ()
    of_prompts: Callable[[int, Sequence[str]], Sequence[Method]] | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    rewrite: Rewrite | None = None
    negative: Negative | None = None
    dnp: DiffusionNegativePrompt | None = None

    def acting(self, seed: int, prompts: Sequence[str]) -> list[Method]:
        """The methods that act on a call with this seed and these prompts."""
        return [*self.methods(seed), *(self.of_prompts(seed, prompts) if self.of_prompts is not None else ())]

    def plain(self, seed: int, prompts: Sequence[str] = ()) -> dict[str, Any]:
        """As JSON can hold it.

        Args:
            seed: of methods with noise of their own. prompts: of a first call.
        """
        told: dict[str, Any] = {"methods": [_told(settings) for settings in self.acting(seed, prompts)], "call": dict(self.call)}
        if self.dnp is not None:
            told["dnp"] = {"captioner": str(getattr(self.dnp.captioner, "identity", self.dnp.captioner))}
        return told | {what: True for what in ("rewrite", "negative") if getattr(self, what) is not None}


def draw(
    pipe: Any,
    protocol: Protocol,
    variants: Sequence[Variant],
    call: Mapping[str, Any],
    groups_a_call: int = 1,
    keep: Callable[[str, Group], object] = lambda variant, group: None,
    watch: Callable[[str, Sequence[Report]], object] = lambda variant, reports: None,
) -> list[Drawn]:
    """All images of a protocol.

    Every image has a seed of its own, so that without a method, and with NegToMe and others that draw no noise, what else is in a
    call changes nothing. Methods with noise of their own (CADS, seed variance) are seeded anew for each call, by the seed of its
    first image, so that groups are independent; which noise a group gets depends on ``groups_a_call``.

    Args:
        call: of the pipeline; ``negative_prompt`` is one text.
        groups_a_call: how many groups the pipeline draws at once.
        keep: called with a variant's name and each of its groups as soon as it is drawn.
        watch: called with a variant's name and what its methods report after each call of the pipeline.

    Raises:
        TypeError, ValueError: what a method or the pipeline refuses. CaptionError: of a captioner.
    """
    groups: dict[str, list[Group]] = {variant.name: [] for variant in variants}
    did: dict[str, list[str]] = {}
    for seed in protocol.seeds:
        cases = list(protocol.cases(seed))
        for variant in variants:
            for start in range(0, len(cases), groups_a_call):
                part = cases[start : start + groups_a_call]
                methods = variant.acting(_seed_of_call(part), [case.prompt for case in part])
                with _acting(pipe, methods):
                    for group in _draw(pipe, variant, part, {**call, **variant.call}):
                        groups[variant.name].append(group)
                        keep(variant.name, group)
                    reports = list(status(pipe)) if methods else []
                watch(variant.name, reports)
                did.setdefault(variant.name, [str(report) for report in reports])
    first, prompts = protocol.seeds[0], protocol.prompts[:groups_a_call]
    return [
        Drawn(variant.name, tuple(groups[variant.name]), variant.plain(first, prompts) | {"reports": did.get(variant.name, [])})
        for variant in variants
    ]


def _seed_of_call(cases: Sequence[Case]) -> int:
    """For methods with noise of their own, which take seeds below 2**32."""
    return cases[0].image_seeds[0] % 2**32


@contextmanager
def _acting(pipe: Any, methods: Sequence[Method]) -> Iterator[None]:
    """With methods on the pipeline, which has none afterwards."""
    if methods:
        apply(pipe, *methods)
    try:
        yield
    finally:
        if methods:
            remove(pipe)


def _draw(pipe: Any, variant: Variant, cases: Sequence[Case], call: Mapping[str, Any]) -> list[Group]:
    """The groups of some cases, in one call of the pipeline, or two."""
    per = len(cases[0].image_seeds)
    seeds = [seed for case in cases for seed in case.image_seeds]
    texts = [text for case in cases for text in (variant.rewrite or _unchanged)(case.prompt, per)]
    negatives: list[str] = []  # that are chosen for each image
    if variant.dnp is not None:
        records = diffusion_negative_prompting(pipe, texts, variant.dnp, seed=seeds, **_for_rows(call, len(texts)))
        images, negatives = [record.images[0] for record in records], [record.negative_prompt for record in records]
    else:
        each = variant.rewrite is not None or variant.negative is not None
        rows = texts if each else [case.prompt for case in cases]
        arguments = _for_rows(call, len(rows))
        if variant.negative is not None:
            of_images = [(case.prompt, seed) for case in cases for seed in case.image_seeds]
            arguments["negative_prompt"] = negatives = [variant.negative(prompt, seed) for prompt, seed in of_images]
        generators = [torch.Generator(pipe.device.type).manual_seed(seed) for seed in seeds]
        images = pipe(rows, num_images_per_prompt=1 if each else per, generator=generators, **arguments).images
    return [
        Group(
            key=case.key,
            images=tuple(image.convert("RGB") for image in images[number * per : (number + 1) * per]),
            names=tuple(f"{case.key}/{k}" for k in range(per)),
            prompt=case.prompt,
            texts=tuple(texts[number * per : (number + 1) * per]) if variant.rewrite is not None else (),
            negative_prompts=tuple(negatives[number * per : (number + 1) * per]),
            seed=case.seed,
            image_seeds=case.image_seeds,
            call_seed=_seed_of_call(cases),
        )
        for number, case in enumerate(cases)
    ]


def _told(method: Method) -> dict[str, Any]:
    """As plain data; pictures that come from no file are said to be in memory."""
    if not isinstance(method, NegToMe) or all(getattr(one.image, "filename", None) for one in method.pictures):
        return as_plain(method)
    reference = [{"image": "in memory", "mask": one.mask is not None, "noise": one.noise} for one in method.pictures]
    return as_plain(replace(method, reference="first")) | {"reference": reference}


def _unchanged(prompt: str, images: int) -> Sequence[str]:
    return [prompt] * images


def _for_rows(call: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The call's arguments, with its negative prompt for each prompt, as pipelines want lists of equal length."""
    negative = call.get("negative_prompt")
    return {**call, **({"negative_prompt": [negative] * rows} if isinstance(negative, str) else {})}
