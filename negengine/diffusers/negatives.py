"""Negative images with their captions: kept in a cache, given by the caller, or drawn and captioned now."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from negengine import png
from negengine.captioners import CaptionCache, CaptionError, NegativeImage, ask, identity
from negengine.captioners.cache import fingerprint
from negengine.diffusers.dns import diffusion_negative_image
from negengine.diffusers.families import find_denoiser
from negengine.methods import DiffusionNegativePrompt


def captioned(
    pipe: Any,
    pairs: Sequence[Mapping[str, Any]],
    settings: DiffusionNegativePrompt,
    shared: Mapping[str, Any],
    cache: CaptionCache | None,
    given: Sequence[NegativeImage],
    output: Path | None,
) -> list[NegativeImage]:
    """The negative image of every pair of a prompt and a seed, with its caption: kept, given, or drawn and captioned now."""
    facts = [_facts(pipe, pair, shared) for pair in pairs]
    keys = [_key(settings, pair, about) for pair, about in zip(pairs, facts, strict=True)] if cache else []
    told = [{name: _told_apart(value) for name, value in about.items()} for about in facts]
    kept = [cache.find(key) for key in keys] if cache else [None] * len(pairs)
    images: list[NegativeImage | None] = [
        NegativeImage(pair["prompt"], pair["seed"], found[1], found[0], drawn) if found else _among(given, pair, drawn)
        for pair, drawn, found in zip(pairs, told, kept, strict=True)
    ]
    missing = [i for i, image in enumerate(images) if image is None]
    if missing:
        prompts, seeds = [pairs[i]["prompt"] for i in missing], [pairs[i]["seed"] for i in missing]
        pictures = diffusion_negative_image(pipe, prompts, seed=seeds, **shared)
        for i, picture in zip(missing, pictures, strict=True):
            images[i] = NegativeImage(pairs[i]["prompt"], pairs[i]["seed"], picture, None, told[i])
    known = [image for image in images if image is not None]
    for i, image in enumerate(known):  # one after the other: what is captioned is kept, whatever comes after
        if image.caption is not None:
            continue
        caption = _caption(settings, known, i, pairs[i], output)
        known[i] = dataclasses.replace(image, caption=caption)
        if cache:
            about = {**pairs[i], "caption": caption, "role": "negative image"}
            cache.keep(keys[i], caption, png.encode(image.image, about))
    return known


def _among(given: Sequence[NegativeImage], pair: Mapping[str, Any], drawn: Mapping[str, Any]) -> NegativeImage | None:
    """The negative image of a pair, if it is given. Raises ValueError if it was drawn otherwise."""
    for image in given:
        if (image.prompt, image.seed) == (pair["prompt"], pair["seed"]):
            other = [name for name in drawn if image.drawn.get(name) != drawn[name]]
            if other:
                raise ValueError(
                    f"the negative image of {image.prompt!r}, seed {image.seed}, was drawn with another {' and '.join(other)}; "
                    "call as before, or leave it out of `negatives`"
                )
            return image
    return None


def _caption(
    settings: DiffusionNegativePrompt, images: Sequence[NegativeImage], number: int, pair: Mapping[str, Any], output: Path | None
) -> str:
    """The captioner's word on one of ``images``."""
    picture = images[number].image
    try:
        return ask(settings.captioner, picture)
    except Exception as error:
        path, reason = _put_by(picture, pair, output, str(error) or type(error).__name__)
        raise CaptionError(reason, pair["prompt"], pair["seed"], picture, path, images) from error


def _put_by(picture: Image.Image, pair: Mapping[str, Any], output: Path | None, reason: str) -> tuple[Path | None, str]:
    """Where a picture without a caption has been written, and the reason with what went wrong in writing it."""
    if output is None:
        return None, reason
    path = png.free(output / f"uncaptioned-{png.slug(pair['prompt'])}-seed{pair['seed']}.png")
    try:
        png.write(picture, path, {**pair, "role": "negative image"})
    except OSError as error:
        return None, f"{reason}, and its picture could not be written ({error})"
    return path, reason


def is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(is_plain(part) for part in value)
    return value is None or isinstance(value, str | int | float | bool)


def _facts(pipe: Any, pair: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """All that a negative image hangs on, but for the model's weights."""
    denoiser, family = find_denoiser(pipe)
    config = {name: value if is_plain(value) else repr(value) for name, value in pipe.scheduler.config.items() if name[0] != "_"}
    return {
        "pipeline": pair["pipeline"],
        "dtype": str(getattr(denoiser, "dtype", None)),
        "scheduler": [type(pipe.scheduler).__name__, config],
        "prompt": pair["prompt"],
        "seed": [pipe._execution_device.type, pair["seed"]],
        "steps": pair["dnp"]["steps"],
        "guidance": pair["dnp"]["guidance"],
        "call": {name: value for name, value in shared.items() if name not in ("num_inference_steps", family.conditioning.scale)},
    }


def _told_apart(value: Any) -> Any:
    """``value`` in a form that can be compared; of what cannot be told from another of its kind, the kind."""
    if isinstance(value, Mapping):
        return {name: _told_apart(part) for name, part in value.items()}
    try:
        return fingerprint(value)
    except TypeError:
        return type(value).__name__


def _key(settings: DiffusionNegativePrompt, pair: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """All that a caption hangs on, for the cache. Raises ValueError if a part of it has no name."""
    if pair["model"] is None:
        raise ValueError("this pipeline does not tell where it was loaded from; name its model: CaptionCache(folder, model=...)")
    if identity(settings.captioner) is None:
        raise ValueError(
            f"captions of {settings.captioner!r} cannot be told from those of another captioner; give it an attribute "
            "`identity`, a text, or call without a cache"
        )
    return {"model": pair["model"], "captioner": pair["dnp"]["captioner"], **facts}
