"""``negengine generate``: images of any supported model, with every setting, and the settings in every file."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console

from negengine import png
from negengine.cli.errors import one_line_errors
from negengine.cli.loading import check_device, check_dtype, load, preset
from negengine.diffusers.families import with_family_defaults
from negengine.environment import versions
from negengine.methods import NegToMe, ReferenceImage


@one_line_errors
def generate(
    model: Annotated[str, typer.Option(help="A local folder, a hub model id, or an embedded model (mnist-flux, mnist-sdxl).")],
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeatable.")],
    output: Annotated[Path, typer.Option(help="Folder for the images; existing files are never overwritten.")] = Path(
        "out/generate"
    ),
    count: Annotated[int, typer.Option(min=1, help="Images per prompt: the group whose images are pushed apart.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the call.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; the pipeline's default if not given.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="In pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="In pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance_scale.")] = None,
    true_cfg: Annotated[float | None, typer.Option(help="true_cfg_scale (FLUX), with --negative-prompt.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Text to avoid.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    negtome: Annotated[bool, typer.Option(help="Merge, or draw the same seeds without.")] = True,
    alpha: Annotated[
        float | None, typer.Option(help="How far tokens are pushed. Left out: as the model or its family has it.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Least cosine of a pushed token, in [-1, 1].")] = None,
    timesteps: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="Active window of the 1000 timesteps.")
    ] = None,
    blocks: Annotated[list[str] | None, typer.Option(help="Names, leading parts or globs of attention blocks; repeatable.")] = None,
    min_grid: Annotated[int | None, typer.Option(min=1, help="Coarser blocks are left alone.")] = None,
    reference: Annotated[
        list[str] | None, typer.Option(help="first, others, previous, or the path of a picture to avoid (then repeatable).")
    ] = None,
    mask: Annotated[
        list[Path] | None, typer.Option(help="Mask of the picture at the same place: white is avoided; repeatable.")
    ] = None,
    noise: Annotated[bool, typer.Option(help="Noise the pictures to the current timestep.")] = True,
    matching: Annotated[str | None, typer.Option(help="paper (default) or release.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Share of tokens left out at random; 0 if not given.")] = None,
    group_size: Annotated[int | None, typer.Option(min=1, help="Images per group; --count if not given.")] = None,
    search: Annotated[str | None, typer.Option(help="auto (default), exact, or a precision that the backend has.")] = None,
    backend: Annotated[str | None, typer.Option(help="See `negengine doctor`.")] = None,
) -> None:
    """Draw images with NegToMe and write them as PNG files that carry all settings."""
    options: dict[str, Any] = {
        "alpha": alpha,
        "threshold": threshold,
        "timesteps": timesteps,
        "blocks": blocks or None,
        "min_grid": min_grid,
        "reference": _references(reference or ["first"], mask or [], noise) if reference or mask or not noise else None,
        "matching": matching,
        "dropout": dropout,
        "group_size": group_size,
        "search": search,
        "backend": backend,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if not negtome and given:
        raise ValueError(f"--no-negtome leaves nothing to set; drop it, or {', '.join(given)}")
    settings = dataclasses.replace(_negtome_preset(model), **given, seed=seed)
    check_dtype(dtype)
    if group_size is not None and (len(prompt) * count) % group_size:
        raise ValueError(f"--group-size {group_size} does not divide the {len(prompt) * count} images of the call")
    files = _files(output, prompt, count, seed)
    call = _call(model, prompt, count, steps, height, width, guidance, true_cfg, negative_prompt)
    check_device(device)

    from negengine import apply, status

    console = Console()
    pipe = load(model, dtype, device)
    if negtome:
        apply(pipe, settings)
    generator = torch.Generator(device).manual_seed(seed)
    images = pipe(**call, generator=generator).images
    told = {
        "model": model,
        "seed": seed,
        "dtype": dtype,
        "call": {name: value for name, value in call.items() if name != "prompt"},
        "negtome": _told(pipe, settings, reference, mask or [], noise) if negtome else None,
        "versions": versions(),
    }
    for i, (image, file) in enumerate(zip(images, files, strict=True)):
        png.write(image, file, {"prompt": prompt[i // count], "index": i % count} | told)
    if negtome and (report := status(pipe)[NegToMe]).idle_reason is None:  # a run that changed nothing has warned already
        console.print(str(report), soft_wrap=True)
    console.print(f"{len(files)} images in {output}", soft_wrap=True)


def _references(names: list[str], masks: list[Path], noise: bool) -> str | list[ReferenceImage]:
    if names[0] in ("first", "others", "previous"):
        if len(names) > 1 or masks:
            raise ValueError(f"--reference {names[0]} stands alone; several references and masks are for pictures")
        if not noise:
            raise ValueError("--no-noise is for reference pictures; give one with --reference, or drop it")
        return names[0]
    if masks and len(masks) != len(names):
        raise ValueError(f"{len(names)} reference pictures, but {len(masks)} masks; give one for each or none")
    pictures = [_open("reference", Path(name)) for name in names]
    opened: list[Image.Image | None] = [*(_open("mask", mask) for mask in masks)] or [None] * len(pictures)
    return [ReferenceImage(picture, m, noise=noise) for picture, m in zip(pictures, opened, strict=True)]


def _open(what: str, path: Path) -> Image.Image:
    if not path.is_file():
        raise ValueError(f"--{what} {path} is neither first, others, previous nor a file")
    try:
        image = Image.open(path)
        image.load()
    except OSError as error:
        raise ValueError(f"--{what} {path} cannot be read as an image: {error}") from error
    return image


def _files(output: Path, prompts: list[str], count: int, seed: int) -> list[Path]:
    """A stable name for every image; raises ValueError if one is taken."""
    files = []
    for p, prompt in enumerate(prompts):
        files += [output / f"{p:02d}-{png.slug(prompt)}-seed{seed}-{k:02d}.png" for k in range(count)]
    taken = [file for file in files if file.exists()]
    if taken:
        raise ValueError(f"{taken[0]} exists; choose another --output or --seed, or remove it")
    return files


def _call(
    model: str,
    prompts: list[str],
    count: int,
    steps: int | None,
    height: int | None,
    width: int | None,
    guidance: float | None,
    true_cfg: float | None,
    negative_prompt: str | None,
) -> dict[str, Any]:
    meant = preset(model, len(prompts))
    if true_cfg is not None and negative_prompt is None and "negative_prompt" not in meant:
        raise ValueError("--true-cfg does nothing without --negative-prompt")
    if guidance is not None and "true_cfg_scale" in meant:
        raise ValueError(f"{model} has no distilled guidance, so --guidance does nothing; use --true-cfg")
    if true_cfg is not None and "guidance_scale" in meant:
        raise ValueError(f"{model} takes no --true-cfg; use --guidance")
    for name, scale in (("guidance", guidance), ("true-cfg", true_cfg)):
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"--{name} must be finite, got {scale}")
    given = {
        "num_inference_steps": steps,
        "height": height,
        "width": width,
        "guidance_scale": guidance,
        "true_cfg_scale": true_cfg,
        "negative_prompt": None if negative_prompt is None else [negative_prompt] * len(prompts),
    }
    told = {name: value for name, value in given.items() if value is not None}
    return meant | {"prompt": prompts, "num_images_per_prompt": count} | told


def _negtome_preset(model: str) -> NegToMe:
    """An embedded model has settings of its own; other models have their family's defaults."""
    from negengine import models

    return models.negtome_preset(model) if model in models.NAMES else NegToMe()


def _told(pipe: Any, settings: NegToMe, references: list[str] | None, masks: list[Path], noise: bool) -> dict[str, Any]:
    """The settings with the family's defaults filled in, as JSON can hold them."""
    settings = with_family_defaults(settings, pipe)
    fields = {name: getattr(settings, name) for name in settings.__dataclass_fields__ if name != "reference"}
    pictures = {"mask": [str(mask) for mask in masks], "noise": noise} if settings.pictures else {}
    return fields | {"reference": references if settings.pictures else settings.reference} | pictures
