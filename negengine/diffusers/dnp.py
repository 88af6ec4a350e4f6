"""Diffusion-negative prompting (DNP, arXiv 2411.05473): a run for the negative image, its caption, and the run that avoids it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

    def save(self, folder: Path, number: int = 0, also: Mapping[str, Any] | None = None) -> list[Path]:
        """Write the negative image and the images as PNG files that carry all settings, and return where.

        Args:
            number: of the prompt, which begins the names of the files.
            also: what the images' files carry besides, as JSON can hold it.

        Raises:
            FileExistsError: one of them is there already; nothing is overwritten.
        """
        paths = self.files(folder, number)
        png.write(self.negative_image, paths[0], {**self.told, "role": "negative image"})
        for index, (image, path) in enumerate(zip(self.images, paths[1:], strict=True)):
            png.write(image, path, {**self.told, "role": "image", "index": index, "seed": self.seed + index, **(also or {})})
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
    pairs = [{"prompt": prompt, "seed": number, **told} for prompt, number in zip(prompts, seeds, strict=True)]
    keys = [_key(pipe, settings, pair, shared) for pair in pairs] if cache else []
    kept: list[tuple[str, Image.Image] | None] = [cache.find(key) for key in keys] if cache else [None] * len(pairs)
    missing = [i for i, found in enumerate(kept) if found is None]
    asked = _captioned(pipe, [pairs[i] for i in missing], settings, shared, None if output is None else Path(output))
    for i, found in zip(missing, asked, strict=True):  # one after the other: what is captioned is kept, whatever comes after
        kept[i] = found
        if cache:
            about = {**pairs[i], "caption": found[0], "role": "negative image"}
            cache.keep(keys[i], found[0], png.encode(found[1], about))
    captions = [found for found in kept if found is not None]
    negatives = [_beside(text if settings.keep_own else None, caption) for text, (caption, _) in zip(own, captions, strict=True)]
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
            told={**pairs[i], "caption": caption, "negative_prompt": negative},
        )
        for i, (prompt, number, negative, (caption, picture)) in enumerate(zip(prompts, seeds, negatives, captions, strict=True))
    ]


def _captioned(
    pipe: Any, pairs: Sequence[Mapping[str, Any]], settings: DiffusionNegativePrompt, shared: Mapping[str, Any], output: Path | None
) -> Iterator[tuple[str, Image.Image]]:
    """The caption and the negative image of every pair of a prompt and a seed, drawn in one run."""
    if not pairs:
        return
    prompts, seeds = [pair["prompt"] for pair in pairs], [pair["seed"] for pair in pairs]
    pictures = diffusion_negative_image(pipe, prompts, seed=seeds, **shared)
    for pair, picture in zip(pairs, pictures, strict=True):
        try:
            caption = ask(settings.captioner, picture)
        except Exception as error:
            reason = str(error) or type(error).__name__
            path, reason = _put_by(picture, pair, output, reason)
            raise CaptionError(reason, pair["prompt"], pair["seed"], picture, path) from error
        yield caption, picture


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


def _key(pipe: Any, settings: DiffusionNegativePrompt, pair: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """All that a caption hangs on, for the cache. Raises ValueError if a part of it has no name."""
    if pair["model"] is None:
        raise ValueError("this pipeline does not tell where it was loaded from; name its model: CaptionCache(folder, model=...)")
    if identity(settings.captioner) is None:
        raise ValueError(
            f"captions of {settings.captioner!r} cannot be told from those of another captioner; give it an attribute "
            "`identity`, a text, or call without a cache"
        )
    denoiser, family = find_denoiser(pipe)
    config = {name: value if _plain(value) else repr(value) for name, value in pipe.scheduler.config.items() if name[0] != "_"}
    return {
        "model": pair["model"],
        "pipeline": pair["pipeline"],
        "dtype": str(getattr(denoiser, "dtype", None)),
        "scheduler": [type(pipe.scheduler).__name__, config],
        "prompt": pair["prompt"],
        "seed": [pipe._execution_device.type, pair["seed"]],
        "steps": pair["dnp"]["steps"],
        "guidance": pair["dnp"]["guidance"],
        "captioner": pair["dnp"]["captioner"],
        "call": {name: value for name, value in shared.items() if name not in ("num_inference_steps", family.conditioning.scale)},
    }
