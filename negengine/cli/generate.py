"""``negengine generate``: images of any supported model with any methods, and all settings in every file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console

from negengine import png
from negengine.cli.choice import AVOID_HELP, METHOD_HELP, ONE_FOR_EACH, SET_HELP, choose, negtome_flags, one_or_each
from negengine.cli.errors import one_line_errors
from negengine.cli.loading import SCHEDULER_HELP, check_device, load
from negengine.cli.runs import Run, call_of, changes, read_file, read_picture
from negengine.cli.words import counted, in_flags, put_on
from negengine.environment import machine, versions

DEFAULTS = {"count": 4, "seed": 0, "dtype": "float32", "device": "cpu"}
PIPELINE, METHODS, NEGTOME = "Of the pipeline", "Methods", "NegToMe, in short"
MODEL_HELP = "A local folder, a hub model id, or an embedded model (people-flux, mnist-sdxl, …)."
SETTINGS_HELP = "A .yaml or .json file of model, prompt, count, seed, dtype, device, scheduler, call, methods, or some of them."
LIKE_HELP = "Repeat the call that drew this PNG, with what other flags change."
OUTPUT_HELP = "Folder for the images, out/generate if not given (--like: out/like). Existing files are never overwritten."
REFERENCE_HELP = "first, others, previous, or the path of a picture to avoid (then repeatable)."


@one_line_errors
def generate(
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; repeatable.")] = None,
    output: Annotated[Path | None, typer.Option(help=OUTPUT_HELP)] = None,
    settings: Annotated[Path | None, typer.Option(help=SETTINGS_HELP)] = None,
    like: Annotated[Path | None, typer.Option(help=LIKE_HELP)] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Images per prompt, the group that is pushed apart; 4.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Of the call and its methods; 0.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (default), float16 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu (default), cuda, cuda:1, …")] = None,
    scheduler: Annotated[str | None, typer.Option(metavar="NAME", help=SCHEDULER_HELP, rich_help_panel=PIPELINE)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.", rich_help_panel=PIPELINE)] = None,
    height: Annotated[int | None, typer.Option(min=8, help="In pixels.", rich_help_panel=PIPELINE)] = None,
    width: Annotated[int | None, typer.Option(min=8, help="In pixels.", rich_help_panel=PIPELINE)] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance_scale.", rich_help_panel=PIPELINE)] = None,
    true_cfg: Annotated[
        float | None, typer.Option(help="true_cfg_scale (FLUX.1, Qwen-Image), with --negative-prompt.", rich_help_panel=PIPELINE)
    ] = None,
    negative_prompt: Annotated[
        list[str] | None,
        typer.Option(help=f"Text to avoid by the pipeline's own guidance.{ONE_FOR_EACH}", rich_help_panel=PIPELINE),
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help=METHOD_HELP, rich_help_panel=METHODS)] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP, rich_help_panel=METHODS)] = None,
    avoid: Annotated[list[str] | None, typer.Option(help=AVOID_HELP + ONE_FOR_EACH, rich_help_panel=METHODS)] = None,
    alpha: Annotated[float | None, typer.Option(help="How far tokens are pushed.", rich_help_panel=NEGTOME)] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Least cosine of a pushed token, in [-1, 1].", rich_help_panel=NEGTOME)
    ] = None,
    timesteps: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Active window of the 1000 timesteps.", rich_help_panel=NEGTOME),
    ] = None,
    reference: Annotated[list[str] | None, typer.Option(help=REFERENCE_HELP, rich_help_panel=NEGTOME)] = None,
    mask: Annotated[
        list[Path] | None,
        typer.Option(help="Mask of the picture at the same place: white is avoided; repeatable.", rich_help_panel=NEGTOME),
    ] = None,
) -> None:
    """Draw images and write them as PNG files that carry all settings.

    What flags say comes before a preset that --method names, then the file (--settings or --like), then what an embedded
    model has of its own, then the defaults.
    """
    picture, filed = _filed(settings, like)
    flags = {
        "model": model,
        "scheduler": scheduler,
        "prompt": prompt,
        "count": count,
        "seed": seed,
        "dtype": dtype,
        "device": device,
    }
    basis = _basis(filed, flags)
    call = {
        "num_inference_steps": steps,
        "height": height,
        "width": width,
        "guidance_scale": guidance,
        "true_cfg_scale": true_cfg,
        "negative_prompt": one_or_each(negative_prompt) if negative_prompt else None,
    }
    of_negtome = negtome_flags(alpha, threshold, timesteps, reference, mask)
    first_seed = basis["seed"] if isinstance(basis["seed"], int) else basis["seed"][0]
    run = Run(
        **basis,
        call=call_of(basis["model"], filed.get("call", {}), picture is not None, call),
        methods=choose(
            basis["model"], first_seed, method or [], set_ or [], of_negtome, avoid or [], filed.get("methods"), filed.get("seed")
        ),
    )
    run.check()
    check_device(run.device)
    files = _files(output or Path("out/like" if like else "out/generate"), run)
    if like and picture:
        _repeat(run, files, like, picture)
    else:
        draw(run, files)


def _filed(settings: Path | None, like: Path | None) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What ``--like``'s picture tells, None without one; and the run in it, or as much of one as ``--settings`` has."""
    if settings and like:
        raise ValueError("--settings and --like both tell a whole run; give one")
    if like:
        picture = read_picture(like)
        return picture, picture["run"]
    return None, read_file(settings) if settings else {}


def _basis(filed: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """All of a run but its call and methods, from flags, the file and the defaults. Raises ValueError for what is missing."""
    given = {name: value for name, value in flags.items() if value not in (None, "", [])}  # typer's empty list is no prompt
    told = {name: value for name, value in filed.items() if name in flags}
    basis = {"scheduler": None, **DEFAULTS, **told, **given}
    missing = [f"--{name}" for name in ("model", "prompt") if name not in basis]
    if missing:
        raise ValueError(f"give {' and '.join(missing)}, or a file that tells: --settings or --like")
    return basis


def _repeat(run: Run, files: list[Path], like: Path, picture: Mapping[str, Any]) -> None:
    """Draw the run of a picture again, and compare."""
    if changed := changes(picture):
        typer.secho(f"warning: {like} was made with {', '.join(changed)}; pixels may differ", fg="yellow", err=True)
    images, plain = draw(run, files)
    _compare(like, picture, plain, images, files)


def draw(run: Run, files: list[Path]) -> tuple[list[Image.Image], dict[str, Any]]:
    """Draw and write the pictures of a run, and say what its methods did. The pictures, and the run as their files tell it."""
    from negengine import status
    from negengine.diffusers.branches import parameters

    pipe = load(run.model, run.dtype, run.device, run.scheduler)
    unknown = [name for name in run.call if name not in parameters(pipe)]
    if unknown:
        raise ValueError(f"the pipeline of {run.model}, {type(pipe).__name__}, takes no {', '.join(unknown)}")
    put_on(pipe, run.methods, run.call)
    with in_flags(run.methods):
        images = pipe(**run.arguments()).images
    plain, reports = run.plain(pipe), status(pipe) if run.methods else ()
    of_call = {"run": plain, "versions": versions(), "machine": machine()}
    for number, (image, file, seed) in enumerate(zip(images, files, run.seeds(), strict=True)):
        of_image = {"prompt": run.prompt[number // run.count], "seed": seed, "index": number % run.count, "number": number}
        did = {settings.name: report.of_image(number) for settings, report in zip(run.methods, reports, strict=True)}
        png.write(image, file, of_image | of_call | {"reports": did})
    console = Console()
    for report in reports:
        if report.idle_reason is None:  # a run that changed nothing has warned already
            console.print(str(report), soft_wrap=True, highlight=False)
    console.print(f"{counted(len(files), 'image')} in {files[0].parent}", soft_wrap=True)
    return images, plain


def _files(output: Path, run: Run) -> list[Path]:
    """A stable name for every image; raises ValueError if one is taken."""
    files = []
    for number, seed in enumerate(run.seeds()):
        prompt, index = divmod(number, run.count)
        files.append(output / f"{prompt:02d}-{png.slug(run.prompt[prompt])}-seed{seed}-{index:02d}.png")
    taken = [file for file in files if file.exists()]
    if taken:
        raise ValueError(f"{taken[0]} exists; choose another --output or --seed, or remove it")
    return files


def _compare(like: Path, told: Mapping[str, Any], plain: Mapping[str, Any], images: list[Image.Image], files: list[Path]) -> None:
    """Say which file repeats a picture. Raises typer.Exit(1) if the same run gave other pixels."""
    changed = [name for name, value in plain.items() if value != told["run"].get(name)]
    number = told["number"]
    if number >= len(images):
        typer.echo(f"no file stands for {like}, which was image {number} of its call; changed: {', '.join(changed)}")
        return
    file, new = files[number], np.asarray(images[number], dtype=int)
    with Image.open(like) as picture:
        before = np.asarray(picture, dtype=int)
    if new.shape == before.shape and (new == before).all():
        typer.echo(f"{file} has exactly the pixels of {like}")
    elif changed:
        typer.echo(f"{file} stands for {like}; changed: {', '.join(changed)}")
    else:
        far = f"at most {abs(new - before).max()} of 255" if new.shape == before.shape else "also in size"
        typer.secho(f"{file} repeats {like}, but its pixels differ ({far})", fg="yellow", err=True)
        raise typer.Exit(1)
