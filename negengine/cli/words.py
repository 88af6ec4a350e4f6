"""The engine's advice in the words of the command line: flags in place of Python."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from negengine.cli.loading import fitting
from negengine.methods import Method

ANCESTRAL = "EulerAncestralDiscreteScheduler"  # has a transition density, and keeps the noise levels of the usual Euler sampler
FLAGS = {
    "num_images_per_prompt": "--count",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "true_cfg_scale": "--true-cfg",
}


def counted(number: int, thing: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


@contextmanager
def in_flags(methods: Sequence[Method], flags: Mapping[str, str] = FLAGS) -> Iterator[None]:
    """TypeError and ValueError that are raised inside become a ValueError that names flags."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(translated(str(error), methods, flags=flags)) from error


def translated(text: str, methods: Sequence[Method], samplers: Sequence[str] = (), flags: Mapping[str, str] = FLAGS) -> str:
    """``surrogate='ancestral'`` becomes ``--set dng.surrogate=ancestral``, and ``guidance_scale`` ``--guidance``.

    Args:
        samplers: those that fit the pipeline; only these are advised.
        flags: by argument of the pipeline's call.
    """
    way = f"--scheduler {ANCESTRAL}, or " if ANCESTRAL in samplers else ""
    text = re.sub(r"switch to one that has \([^)]*\), or set ", f"give {way}", text)
    text = text.replace(
        "DiffusionNegativePrompt(guidance=..., avoid_with=NormalizedAttentionGuidance())", "--nag, --negative-guidance"
    )
    text = text.replace("DiffusionNegativePrompt(guidance=...)", "--negative-guidance")
    text = text.replace("use variant='dng'", "give --method sld:dng")  # the variant alone would keep the numbers of the paper's
    for settings in methods:
        text = text.replace(f"{type(settings).__name__}(", f"{settings.title}(")
        for field in dataclasses.fields(settings):
            text = re.sub(rf"(?<![\w.(])(?:set )?{field.name}='([^']*)'", rf"--set {settings.name}.{field.name}=\1", text)
            text = re.sub(rf"`{field.name}`", f"`--set {settings.name}.{field.name}=…`", text)
    for name, flag in flags.items():
        text = re.sub(rf"\b{name}(=(?=\w))?", lambda found, flag=flag: f"{flag} " if found[1] else flag, text)  # type: ignore[misc]
    return text


def put_on(
    pipe: Any,
    methods: Sequence[Method],
    call: Mapping[str, Any],
    instead: str = "give --true-cfg 1",
    flags: Mapping[str, str] = FLAGS,
) -> None:
    """``apply`` for a call; raises one ValueError with all flags that are wanting.

    Args:
        instead: what to give where the call's true CFG is in a method's way. flags: by argument of the pipeline's call.
    """
    from negengine import apply

    faults = []
    if methods:
        try:
            apply(pipe, *methods)
        except (TypeError, ValueError) as error:
            faults.append(translated(str(error), methods, fitting(pipe.scheduler), flags))
    faults += _beside_true_cfg(pipe, methods, call, instead)
    if faults:
        raise ValueError("; and ".join(faults))


def _beside_true_cfg(pipe: Any, methods: Sequence[Method], call: Mapping[str, Any], instead: str) -> list[str]:
    """Why a method cannot act beside guidance in a second call of the denoiser, and what to give."""
    from negengine.diffusers.effects import EFFECTS
    from negengine.diffusers.families import find_denoiser

    denoiser, family = find_denoiser(pipe)
    scale = call.get("true_cfg_scale")
    if family.conditioning.cfg != "calls" or call.get("negative_prompt") is None or not (scale and scale > 1):
        return []
    for settings in methods:
        try:
            EFFECTS[type(settings)](settings, family, denoiser).second_prompts()
        except ValueError:
            guided = [s.name for s in methods if hasattr(s, "cfg")] if "true_cfg" in instead.replace("-", "_") else []
            ways = " ".join([instead, *(f"--set {name}.cfg={scale:g}" for name in guided)])
            return [f"{settings.title} cannot act beside true CFG (scale {scale:g}), which calls the denoiser twice; {ways}"]
    return []
