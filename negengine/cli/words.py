"""The engine's advice in the words of the command line: flags in place of Python."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from negengine.methods import Method

FLAGS = {
    "num_images_per_prompt": "--count",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "true_cfg_scale": "--true-cfg",
}


@contextmanager
def in_flags(methods: Sequence[Method]) -> Iterator[None]:
    """TypeError and ValueError that are raised inside become a ValueError that names flags."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(translated(str(error), methods)) from error


def translated(text: str, methods: Sequence[Method]) -> str:
    """``surrogate='ancestral'`` becomes ``--set dng.surrogate=ancestral``, ``guidance_scale`` becomes ``--guidance``."""
    for settings in methods:
        text = text.replace(f"{type(settings).__name__}(", f"{settings.title}(")
        for field in dataclasses.fields(settings):
            text = re.sub(rf"(?<![\w.(]){field.name}='([^']*)'", rf"--set {settings.name}.{field.name}=\1", text)
            text = re.sub(rf"`{field.name}`", f"`--set {settings.name}.{field.name}=…`", text)
    for name, flag in FLAGS.items():
        text = re.sub(rf"\b{name}(=(?=\w))?", lambda found, flag=flag: f"{flag} " if found[1] else flag, text)  # type: ignore[misc]
    return text


def check_true_cfg(pipe: Any, methods: Sequence[Method], call: Mapping[str, Any]) -> None:
    """Raises ValueError, with the flags that work, where a method cannot act beside guidance in a second call of the denoiser."""
    from negengine.diffusers.apply import applied_to
    from negengine.diffusers.families import find_denoiser

    scale = call.get("true_cfg_scale")
    if find_denoiser(pipe)[1].conditioning.cfg != "calls" or call.get("negative_prompt") is None or not (scale and scale > 1):
        return
    for settings in methods:
        effect = applied_to(pipe, type(settings))
        try:
            assert effect is not None
            effect.second_prompts()
        except ValueError as error:
            own = [s for s in methods if any(field.name == "cfg" for field in dataclasses.fields(s))]
            guided = " ".join(f"--set {s.name}.cfg={scale:g}" for s in own)
            ways = f"--true-cfg 1 {guided}".strip()
            raise ValueError(
                f"{settings.title} cannot act beside true CFG (--true-cfg {scale:g}, which calls the denoiser twice); give {ways}"
            ) from error
