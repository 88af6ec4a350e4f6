"""Diffusion-negative prompting (DNP, arXiv 2411.05473): a run for the negative image, its caption, and the run that avoids it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from negengine import png
from negengine.captioners import CaptionCache, CaptionError, ask, identity
from negengine.diffusers.branches import argument, guidance_scale
from negengine.diffusers.dns import (
    check_call,
    diffusion_negative_image,
    first_run,
    generators,
    negatives_of,
    seeds_of,
    texts,
)
from negengine.diffusers.families import find_denoiser
from negengine.environment import versions
from negengine.methods import DiffusionNegativePrompt


@dataclass(frozen=True, eq=False)
class DiffusionNegative:
    """What became of one prompt.

    Attributes:
        prompt: as given. seed: of the noise of the negative image and of the first image.
        negative_image: the image that fits the prompt least.
        caption: of the negative image.
        negative_prompt: of the final run: the caption, after the user's own negative prompt if that is kept.
        images: of the final run, with seeds ``seed``, ``seed + 1``, …
        settings: of the method.
        told: what the PNG files carry.
    """

    prompt: str
    seed: int
    negative_image: Image.Image
    caption: str
    negative_prompt: str
    images: tuple[Image.Image, ...]
    settings: DiffusionNegativePrompt
    told: Mapping[str, Any] = field(repr=False)

    def files(self, folder: Path, number: int = 0) -> list[Path]:
        """Where :meth:`save` writes: the negative image first, then the images."""
        return files(folder, number, self.prompt, self.seed, len(self.images))

    def save(self, folder: Path, number: int = 0) -> list[Path]:
        """Write the negative image and the images as PNG files that carry all settings, and return where.

        Args:
            number: of the prompt, which begins the names of the files.

        Raises:
            FileExistsError: one of them is there already; nothing is overwritten.
        """
        paths = self.files(folder, number)
        png.write(self.negative_image, paths[0], {**self.told, "role": "negative image"})
        for index, (image, path) in enumerate(zip(self.images, paths[1:], strict=True)):
            png.write(image, path, {**self.told, "role": "image", "index": index, "seed": self.seed + index})
        return paths


def files(folder: Path, number: int, prompt: str, seed: int, images: int = 1) -> list[Path]:
    """The names of a prompt's files, before there are any."""
    stem = f"{number:02d}-{png.slug(prompt)}-seed{seed}"
    return [folder / f"{stem}-negative.png", *(folder / f"{stem}-{k:02d}.png" for k in range(images))]


def diffusion_negative_prompting(
    pipe: Any,
    prompts: str | Sequence[str],
    settings: DiffusionNegativePrompt,
    *,
    seed: int | Sequence[int],
    cache: CaptionCache | None = None,
    output: str | Path | None = None,
    **call: Any,
) -> list[DiffusionNegative]:
    """Draw the image that fits each prompt least, have it captioned, and draw the prompts with the captions as negative prompts.

    A caption belongs to a prompt and a seed. Methods that were applied to the pipeline act in the final run only.

    Args:
        pipe: as :func:`~negengine.diffusion_negative_image` takes it.
        prompts: a text, or several.
        settings: of the method. Steps and guidance left at None are those of the call.
        seed: for several prompts one for all or one each.
        cache: keeps every caption and its picture as soon as it is given; what it has is neither drawn nor captioned again.
        output: folder for a picture that the captioner failed on.
        call: further arguments of the pipeline's call, for both runs. ``negative_prompt`` is the user's own, for the final
            run only. With ``num_images_per_prompt`` n the final images have the seeds ``seed`` … ``seed + n - 1``, and the
            caption is that of the first.

    Returns:
        One record per prompt.

    Raises:
        TypeError, ValueError: arguments that cannot work, and a pipeline without a negative branch; nothing has been drawn.
            A file of the cache that is damaged.
        CaptionError: the captioner raised, or returned nothing; keeps prompt, seed and picture.
        RuntimeError: as :func:`~negengine.diffusion_negative_image`.
    """
    if not isinstance(settings, DiffusionNegativePrompt):
        raise TypeError(f"settings must be a DiffusionNegativePrompt, got {type(settings).__name__}")
    prompts = texts(prompts)
    seeds = seeds_of(seed, len(prompts))
    check_call(pipe, call, len(prompts))
    own = negatives_of(call.pop("negative_prompt", None), len(prompts))
    per_prompt = call.pop("num_images_per_prompt", None) or 1
    shared = call | first_run(pipe, settings.steps, settings.guidance)
    guidance_scale(pipe, call), guidance_scale(pipe, shared)
    if all(text == "" for text in own):
        shared["negative_prompt"] = ""  # not the same as none at all, for SDXL
    told = _told(pipe, settings, shared, call, cache)
    pairs = list(zip(prompts, seeds, strict=True))
    facts = [_facts(pipe, told, settings, shared, prompt, number) for prompt, number in pairs] if cache else []
    found = _captioned(pipe, prompts, seeds, settings, shared, told, facts, cache, None if output is None else Path(output))
    negatives = [_beside(text if settings.keep_own else None, caption) for text, (caption, _) in zip(own, found, strict=True)]
    drawn = pipe(
        prompt=prompts,
        negative_prompt=negatives,
        num_images_per_prompt=per_prompt,
        generator=generators(pipe, [number + k for number in seeds for k in range(per_prompt)]),
        **call,
    ).images
    return [
        DiffusionNegative(
            prompt=prompt,
            seed=number,
            negative_image=picture,
            caption=caption,
            negative_prompt=negative,
            images=tuple(drawn[i * per_prompt : (i + 1) * per_prompt]),
            settings=settings,
            told={"prompt": prompt, "seed": number, "caption": caption, "negative_prompt": negative, **told},
        )
        for i, (prompt, number, negative, (caption, picture)) in enumerate(zip(prompts, seeds, negatives, found, strict=True))
    ]


def _captioned(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: DiffusionNegativePrompt,
    shared: Mapping[str, Any],
    told: Mapping[str, Any],
    facts: Sequence[Mapping[str, Any]],
    cache: CaptionCache | None,
    output: Path | None,
) -> list[tuple[str, Image.Image]]:
    """For every prompt the caption and the negative image; those that the cache lacks are drawn in one run."""
    found = {i: kept for i, fact in enumerate(facts) if cache and (kept := cache.find(fact)) is not None}
    missing = [i for i in range(len(prompts)) if i not in found]
    if missing:
        pictures = diffusion_negative_image(pipe, [prompts[i] for i in missing], seed=[seeds[i] for i in missing], **shared)
        for i, picture in zip(missing, pictures, strict=True):
            about = {"prompt": prompts[i], "seed": seeds[i], **told}
            caption = _ask(settings, picture, about, output)
            if cache is not None:
                cache.keep(facts[i], caption, png.encode(picture, {**about, "caption": caption, "role": "negative image"}))
            found[i] = caption, picture
    return [found[i] for i in range(len(prompts))]


def _ask(settings: DiffusionNegativePrompt, picture: Image.Image, about: Mapping[str, Any], output: Path | None) -> str:
    try:
        return ask(settings.captioner, picture)
    except Exception as error:
        path = None
        if output is not None:
            path = png.free(output / f"uncaptioned-{png.slug(about['prompt'])}-seed{about['seed']}.png")
            png.write(picture, path, {**about, "role": "negative image"})
        reason = str(error) or type(error).__name__
        raise CaptionError(reason, about["prompt"], about["seed"], picture, path) from error


def _beside(own: str | None, caption: str) -> str:
    return f"{own}, {caption}" if own else caption


def _told(
    pipe: Any, settings: DiffusionNegativePrompt, shared: Mapping[str, Any], call: Mapping[str, Any], cache: CaptionCache | None
) -> dict[str, Any]:
    """What a picture's file tells besides its own prompt, seed and caption."""
    model = (cache.model if cache else None) or getattr(pipe, "name_or_path", None)
    return {
        "model": model,
        "pipeline": type(pipe).__name__,
        "dnp": {
            "steps": argument(pipe, "num_inference_steps", shared),
            "guidance": guidance_scale(pipe, shared),
            "keep_own": settings.keep_own,
            "captioner": identity(settings.captioner) or repr(settings.captioner),
        },
        "call": {name: value if _plain(value) else type(value).__name__ for name, value in call.items()},
        "versions": versions(),
    }


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(part) for part in value)
    return value is None or isinstance(value, str | int | float | bool)


def _facts(
    pipe: Any, told: Mapping[str, Any], settings: DiffusionNegativePrompt, shared: Mapping[str, Any], prompt: str, seed: int
) -> dict[str, Any]:
    """All that a caption hangs on, for the cache. Raises ValueError if a part of it has no name."""
    if told["model"] is None:
        raise ValueError("this pipeline does not tell where it was loaded from; name its model: CaptionCache(folder, model=...)")
    if identity(settings.captioner) is None:
        raise ValueError(
            f"captions of {settings.captioner!r} cannot be told from those of another captioner; give it an attribute "
            "`identity`, a text, or call without a cache"
        )
    scale = find_denoiser(pipe)[1].conditioning.scale
    config = {name: value if _plain(value) else repr(value) for name, value in pipe.scheduler.config.items() if name[0] != "_"}
    return {
        "model": told["model"],
        "pipeline": told["pipeline"],
        "scheduler": [type(pipe.scheduler).__name__, config],
        "prompt": prompt,
        "seed": [pipe._execution_device.type, seed],
        "steps": told["dnp"]["steps"],
        "guidance": told["dnp"]["guidance"],
        "captioner": told["dnp"]["captioner"],
        "call": {name: value for name, value in shared.items() if name not in ("num_inference_steps", scale)},
    }
