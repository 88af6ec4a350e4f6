"""Diffusion-negative prompting (DNP, arXiv 2411.05473): a run for the negative image, its caption, and the run that avoids it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from negengine import png
from negengine.captioners import CaptionCache, NegativeImage, identity
from negengine.diffusers.apply import beside, check_beside
from negengine.diffusers.branches import argument, away_from, guidance_scale
from negengine.diffusers.dns import check_call, first_run, generators, negatives_of, seeds_of, texts
from negengine.diffusers.families import find_denoiser, with_family_defaults
from negengine.diffusers.negatives import captioned, is_plain
from negengine.environment import versions
from negengine.methods import DiffusionNegativePrompt, NormalizedAttentionGuidance
from negengine.methods.plain import as_plain


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
    negatives: Sequence[NegativeImage] = (),
    output: str | Path | None = None,
    **call: Any,
) -> list[DiffusionNegative]:
    """Draw the image that fits each prompt least, have it captioned, and draw the prompts with the captions as negative prompts.

    A caption belongs to a prompt and a seed. Methods that were applied to the pipeline act in the final run only. With
    ``settings.avoid_with`` the final run avoids the captions by normalized attention guidance, without a negative branch.

    Args:
        pipe: as :func:`~negengine.diffusion_negative_image` takes it.
        prompts: a text, or several.
        settings: of the method. Steps and guidance left at None are those of the call.
        seed: for several prompts one for all or one each.
        cache: keeps every caption and its picture as soon as it is given; what it has is neither drawn nor captioned again.
        negatives: negative images of a call that a failed caption ended (``CaptionError.negatives``). They are not drawn again, and
            captioned only where they have no caption.
        output: folder for a picture that the captioner failed on.
        call: further arguments of the pipeline's call, for both runs. ``negative_prompt`` is the user's own, for the final
            run only. With ``num_images_per_prompt`` n the final images have the seeds ``seed`` … ``seed + n - 1``, and the
            caption is that of the first.

    Returns:
        One record per prompt.

    Raises:
        TypeError, ValueError: arguments that cannot work, and a pipeline without a negative branch; nothing has been drawn.
            A file of the cache that is damaged. One of ``negatives`` that this call would draw otherwise.
        CaptionError: the captioner raised, or returned nothing; keeps prompt and seed, all negative images and the captions so far.
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
    if settings.avoid_with is None:
        guidance_scale(pipe, call), guidance_scale(pipe, shared)
    else:
        guidance_scale(pipe, shared, image_alone=True)
        check_beside(pipe, settings.avoid_with)
    empty = {"negative_prompt": ""} if all(text == "" for text in own) else {}  # not the same as none at all, for SDXL
    shared |= empty
    told = _told(pipe, settings, shared, call, cache)
    pairs = [{"prompt": prompt, "seed": number, **told} for prompt, number in zip(prompts, seeds, strict=True)]
    images = captioned(pipe, pairs, settings, shared, cache, negatives, None if output is None else Path(output))
    captions = [str(image.caption) for image in images]
    texts_to_avoid = [_beside(text if settings.keep_own else None, caption) for text, caption in zip(own, captions, strict=True)]
    call |= {"num_images_per_prompt": per_prompt, **empty}
    call["generator"] = generators(pipe, [number + k for number in seeds for k in range(per_prompt)])
    call, acting = final_call(pipe, settings, call, texts_to_avoid)
    with beside(pipe, *acting):
        drawn = pipe(prompt=prompts, **call).images
    return [
        DiffusionNegative(
            prompt=image.prompt,
            seed=image.seed,
            negative_image=image.image,
            caption=caption,
            negative_prompt=negative,
            images=tuple(drawn[i * per_prompt : (i + 1) * per_prompt]),
            settings=settings,
            told={**pairs[i], "caption": caption, "negative_prompt": negative},
        )
        for i, (image, caption, negative) in enumerate(zip(images, captions, texts_to_avoid, strict=True))
    ]


def final_call(
    pipe: Any, settings: DiffusionNegativePrompt, call: Mapping[str, Any], avoided: Sequence[str]
) -> tuple[dict[str, Any], list[NormalizedAttentionGuidance]]:
    """The final run's arguments away from a text for each prompt, and the method that avoids it if the pipeline does not."""
    if settings.avoid_with is None:
        return {**call, **away_from(pipe, avoided, call)}, []
    conditioning = find_denoiser(pipe)[1].conditioning
    again = conditioning.cfg == "calls"  # guidance in a second call of the denoiser, which does not go with NAG
    dropped = ("negative_prompt", conditioning.scale) if again else ("negative_prompt",)
    kept = {name: value for name, value in call.items() if name not in dropped}
    if again and argument(pipe, conditioning.scale, {}) > 1:
        kept[conditioning.scale] = 1.0
    own = call.get("negative_prompt")
    if not again and own is not None and not any(own):
        kept["negative_prompt"] = ""  # not the same as none at all, for SDXL
    return kept, [dataclasses.replace(settings.avoid_with, negative_prompt=tuple(avoided))]


def _beside(own: str | None, caption: str) -> str:
    return f"{own}, {caption}" if own else caption


def _told(
    pipe: Any, settings: DiffusionNegativePrompt, shared: Mapping[str, Any], call: Mapping[str, Any], cache: CaptionCache | None
) -> dict[str, Any]:
    """What a picture's file tells besides its own prompt, seed and caption."""
    model = (cache.model if cache else None) or getattr(pipe, "name_or_path", None)
    nag = settings.avoid_with
    avoiding = {} if nag is None else {"avoid_with": as_plain(with_family_defaults(nag, pipe))}
    return {
        "model": model,
        "pipeline": type(pipe).__name__,
        "dnp": {
            "steps": argument(pipe, "num_inference_steps", shared),
            "guidance": guidance_scale(pipe, shared),
            "keep_own": settings.keep_own,
            "captioner": identity(settings.captioner) or repr(settings.captioner),
            **avoiding,
        },
        "call": {name: value if is_plain(value) else type(value).__name__ for name, value in call.items()},
        "versions": versions(),
    }
