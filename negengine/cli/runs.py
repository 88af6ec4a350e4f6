"""A run of ``negengine generate`` as plain data: what ``--settings`` reads, what every picture carries, what ``--like`` repeats."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from negengine import png
from negengine.cli.choice import WORDS
from negengine.cli.loading import check_dtype, preset
from negengine.cli.words import counted
from negengine.diffusers.families import with_family_defaults
from negengine.environment import machine, versions
from negengine.methods import Method
from negengine.methods.plain import as_plain, read_settings

KEYS = ("model", "prompt", "count", "seed", "dtype", "device", "scheduler", "call", "methods")
LATER = {"scheduler"}  # pictures of earlier versions lack it
DECIDED = {
    "prompt": "give `prompt` beside `call`",
    "num_images_per_prompt": "give `count`",
    "generator": "give `seed`",
    "output_type": "pictures are written as PNG files",
    "return_dict": "drop it",
}  # arguments of a pipeline's call that a file may not have under `call`


@dataclass(frozen=True)
class Run:
    """One call of a pipeline.

    Attributes:
        model: as ``--model`` takes it.
        prompt: texts.
        count: images per prompt.
        seed: of the call; or one for every image, which then has a generator of its own.
        dtype, device: by name.
        call: further arguments of the pipeline's call. ``negative_prompt`` is one text, or one per prompt.
        methods: settings of those that act.
        scheduler: class of the sampler; None: the pipeline's own.
    """

    model: str
    prompt: Sequence[str]
    count: int
    seed: int | Sequence[int]
    dtype: str
    device: str
    call: Mapping[str, Any]
    methods: Sequence[Method]
    scheduler: str | None = None

    @property
    def images(self) -> int:
        return len(self.prompt) * self.count

    def seeds(self) -> list[int]:
        """For each image, the seed that its file names."""
        return [self.seed] * self.images if isinstance(self.seed, int) else list(self.seed)

    def generator(self) -> torch.Generator | list[torch.Generator]:
        if isinstance(self.seed, int):
            return torch.Generator(self.device).manual_seed(self.seed)
        return [torch.Generator(self.device).manual_seed(seed) for seed in self.seed]

    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call."""
        call = dict(self.call)
        negative = call.get("negative_prompt")
        if isinstance(negative, str):
            call["negative_prompt"] = [negative] * len(self.prompt)
        return {"prompt": list(self.prompt), "num_images_per_prompt": self.count, **call, "generator": self.generator()}

    def plain(self, pipe: Any) -> dict[str, Any]:
        """All of it as JSON holds it, with the methods' settings as ``pipe`` uses them."""
        told = {name: getattr(self, name) for name in KEYS[:-1]}
        methods = [as_plain(with_family_defaults(settings, pipe)) for settings in self.methods]
        return json.loads(json.dumps(told | {"methods": methods}))

    def check(self) -> None:
        """Raises ValueError for what cannot be drawn, whatever the model is."""
        check_dtype(self.dtype)
        if not isinstance(self.seed, int) and len(self.seed) != self.images:
            raise ValueError(f"{len(self.seed)} seeds for {self.images} images; give one --seed, or one for each in the file")
        negative = self.call.get("negative_prompt")
        given = [("negative prompts", negative)]
        for settings in self.methods:
            given += [(f"texts of {settings.name}.{name}", getattr(settings, name, None)) for name in sorted(WORDS)]
        for what, texts in given:
            if isinstance(texts, list | tuple) and len(texts) != len(self.prompt):
                raise ValueError(f"{len(texts)} {what} for {counted(len(self.prompt), 'prompt')}; give one, or one for each")


def call_of(model: str, filed: Mapping[str, Any], complete: bool, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline's call: those that flags name, then those of a file, then those that the model is meant to have.

    Args:
        complete: the file tells the whole call, so that the model's own are not asked.

    Raises:
        ValueError: a scale that would do nothing, or is not finite.
    """
    from negengine import models

    embedded = preset(model, 1) if model in models.NAMES else {}
    if isinstance(embedded.get("negative_prompt"), list):
        embedded["negative_prompt"] = embedded["negative_prompt"][0]
    told = {name: value for name, value in given.items() if value is not None}
    call = ({} if complete else embedded) | dict(filed) | told
    if "true_cfg_scale" in told and call.get("negative_prompt") is None and "guidance_scale" not in embedded:
        raise ValueError("--true-cfg does nothing without --negative-prompt")
    if "guidance_scale" in told and "true_cfg_scale" in embedded:
        raise ValueError(f"{model} has no distilled guidance, so --guidance does nothing; use --true-cfg")
    if "true_cfg_scale" in told and "guidance_scale" in embedded:
        raise ValueError(f"{model} takes no --true-cfg; use --guidance")
    for name, flag in (("guidance_scale", "guidance"), ("true_cfg_scale", "true-cfg")):
        if isinstance(value := told.get(name), float) and not math.isfinite(value):
            raise ValueError(f"--{flag} must be finite, got {value}")
    return call


def read_file(path: Path) -> dict[str, Any]:
    """The run in a ``--settings`` file; as much of it as the file has. Raises as :func:`read_settings` and :func:`_checked`."""
    return _checked(path, read_settings(path))


def read_picture(path: Path) -> dict[str, Any]:
    """What a picture's file tells, its whole run under ``"run"``. Raises ValueError if it does not tell how to repeat it."""
    told = png.read(path)
    if told.get("role") == "negative image":
        raise ValueError(
            f"{path} is the negative image of {told.get('prompt')!r}, which `negengine negative` draws; "
            "--like repeats the final pictures only"
        )
    run = told.get("run")
    if not isinstance(run, Mapping) or "number" not in told or any(name not in run for name in KEYS if name not in LATER):
        raise ValueError(f"{path} does not carry the whole run; only pictures that negengine's commands wrote can be repeated")
    return {**told, "run": _checked(path, run)}


def changes(told: Mapping[str, Any]) -> list[str]:
    """Versions and parts of the machine that differ from those that made a picture: "torch 2.11.0 (here 2.12.0)"."""
    found = []
    for there, here in ((told.get("versions") or {}, versions()), (told.get("machine") or {}, machine())):
        for name in here.keys() & there.keys() - {"cores", "system"}:
            if there[name] != here[name]:
                found.append(f"{name} {there[name] or 'none'} (here {here[name] or 'none'})")
    return sorted(found)


def _checked(path: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """Raises ValueError for an unknown name or a value of a wrong kind."""
    unknown = [name for name in run if name not in KEYS]
    if unknown:
        raise ValueError(f"{path} has {', '.join(map(repr, unknown))}; a run has {', '.join(KEYS)}")
    found = dict(run)
    if isinstance(found.get("prompt"), str):
        found["prompt"] = [found["prompt"]]
    kinds = {
        "model": (_text, "a text"),
        "scheduler": (lambda v: v is None or _text(v), "the name of a class, or null for the pipeline's own"),
        "prompt": (lambda v: _list(v, _text) and bool(v), "a text or a list of texts"),
        "count": (lambda v: _whole(v) and v >= 1, "a whole number from 1 on"),
        "seed": (lambda v: _seed(v) or (_list(v, _seed) and bool(v)), "a whole number from 0 on, or one for each image"),
        "dtype": (_text, "a text"),
        "device": (_text, "a text"),
        "call": (lambda v: isinstance(v, Mapping), "a mapping"),
        "methods": (lambda v: _list(v, lambda m: isinstance(m, Mapping)), "a list of mappings such as {method: cads, tau1: 0.5}"),
    }
    for name, value in found.items():
        fits, wanted = kinds[name]
        if not fits(value):
            raise ValueError(f"{path}: {name} must be {wanted}, got {value!r}")
    for name in found.get("call", {}):
        if name in DECIDED:
            raise ValueError(f"{path}: call has {name}: {DECIDED[name]}")
    return found


def _text(value: object) -> bool:
    return isinstance(value, str)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _seed(value: Any) -> bool:
    return _whole(value) and 0 <= value < 2**63


def _list(value: object, fits: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(fits, value))
