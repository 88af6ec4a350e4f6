"""``negengine bench model``: what methods cost a whole pipeline on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from negengine.bench.compare import apart
from negengine.cli.bench.recording import new_folder, record
from negengine.cli.errors import one_line_errors
from negengine.cli.loading import DTYPES, check_device, check_dtype, load, preset
from negengine.cli.quiet import quiet_libraries

Value = TypeVar("Value")
MODEL_HELP = (
    "flux-dev or sdxl-base, built with random weights from their public configurations; or an embedded model, a folder, a hub id."
)
DEPTH_HELP = "Fewer blocks: FLUX.1's joint+single, SDXL's transformer layers at its two lower levels, as 2+2; full if left out."
METHOD_HELP = "What to measure; may be repeated. NegToMe beside the published algorithm if left out; 'all' for every method."
COMPILED_HELP = "Also compiled: blocks, whole or reduce-overhead; may be repeated."
OUTPUT_HELP = (
    "Folder of the results: model.json, report.html, report.md. A further run into it replaces what it measures anew (the same "
    "case, compilation and attention) and keeps the rest."
)
SIZE_HELP = (
    "Pixels of a side: 1024 if left out; an embedded model has its own. May be repeated, as --images: all pairs are measured."
)
IMAGES_HELP = "Of one prompt, in one batch: 4 if left out; may be repeated."
SECONDS_HELP = "No round begins that would end after so many; what takes longer than this at the least is refused."
STEPS_HELP = "The paper's number if left out: 25 for flux-dev, 50 for sdxl-base."
REHEARSE_HELP = "Say what would run, how long and with how much memory, and stop. Of a GPU it needs none."
PROFILE_HELP = "Instead of timing, write traces of an active and an inactive step to the folder, and tell the dearest operators."
ATTENTION_HELP = "Attention backend of diffusers: native, flash, xformers and others; may be repeated."


@one_line_errors
def model(
    output: Annotated[Path, typer.Option(help=OUTPUT_HELP)],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "flux-dev",
    depth: Annotated[str | None, typer.Option(metavar="A+B", help=DEPTH_HELP)] = None,
    size: Annotated[list[int] | None, typer.Option(min=1, help=SIZE_HELP)] = None,
    images: Annotated[list[int] | None, typer.Option(min=1, help=IMAGES_HELP)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help=STEPS_HELP)] = None,
    method: Annotated[list[str] | None, typer.Option(help=METHOD_HELP)] = None,
    compiled: Annotated[list[str] | None, typer.Option(help=COMPILED_HELP)] = None,
    eager: Annotated[bool, typer.Option("--eager/--no-eager", help="As it is, not compiled.")] = True,
    attention: Annotated[list[str] | None, typer.Option(help=ATTENTION_HELP)] = None,
    searches: Annotated[bool, typer.Option("--searches", help="NegToMe with every search that each backend has.")] = False,
    text_encoders: Annotated[bool, typer.Option("--text-encoders", help="With the text encoders' forwards in the loop.")] = False,
    vae: Annotated[bool, typer.Option("--vae", help="With the VAE's decoding in the loop.")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cuda if there is one, else cpu.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Loops of each variant at most.")] = 5,
    seconds: Annotated[float, typer.Option(min=0, help=SECONDS_HELP)] = 420.0,
    profile: Annotated[bool, typer.Option("--profile", help=PROFILE_HELP)] = False,
    rehearse: Annotated[bool, typer.Option("--rehearse", help=REHEARSE_HELP)] = False,
) -> None:
    """Whole denoising loops without, with each method, and with the published algorithm in the same places, taking turns."""
    from negengine.bench import whole
    from negengine.bench.architectures import ARCHITECTURES
    from negengine.bench.results import Results
    from negengine.models import NAMES

    check_dtype(dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not rehearse:
        check_device(device)
    architecture = ARCHITECTURES.get(model)
    if architecture is None and depth is not None:
        raise ValueError(f"--depth is for {' and '.join(ARCHITECTURES)}, whose weights are random; leave it out for {model}")
    if model in NAMES and size:
        raise ValueError(f"--size is for {' and '.join(ARCHITECTURES)} and for checkpoints; {model} has its own: leave it out")
    usual = whole.Setting(
        model=model,
        depth=architecture.depth(depth) if architecture else (0, 0),
        steps=steps or (architecture.steps if architecture else 25),
        device=device,
        dtype=DTYPES[dtype],
        methods=chosen(method),
        eager=eager,
        compiled=unique(compiled or []),
        attention=unique(attention or ["native"]),
        searches=searches,
        text_encoders=text_encoders,
        vae=vae,
        rounds=rounds,
        seconds=seconds,
    )
    quiet_libraries()
    whole.check_attention(usual.attention)
    settings = [replace(usual, size=pixels, images=number) for pixels in unique(size or [1024]) for number in unique(images or [4])]
    if rehearse:
        if not (whole.rehearse(settings, typer.echo) if architecture else told_without(model)):
            raise typer.Exit(2)
        return
    results = Results(output / "model.json", "model", proceed=True)
    check_same_machine(results.document, Results(output / "model.json", "model").document)
    if architecture is None:
        pipe = load(model, dtype, device, others=tuple(ARCHITECTURES))
        subjects = [whole.checkpoint(setting, pipe, preset(model, 1)) for setting in settings]
        whole.check_loaded(settings[-1], subjects[-1])
    else:
        whole.check(settings)
    with new_folder(output):
        if profile:
            from negengine.bench import profiling

            profiling.profile(settings[0], subjects[0] if architecture is None else whole.subject(settings[0]), output, typer.echo)
            return
        if device.startswith("cuda") and (reason := whole.no_instruments()) is not None:
            typer.echo(f"clocks, power and energy are left out: {reason}")
        record(whole.cases(settings, subjects if architecture is None else None, typer.echo), results, output)


def unique(values: Sequence[Value]) -> tuple[Value, ...]:
    return tuple(dict.fromkeys(values))


def told_without(model: str) -> bool:
    """Whether a rehearsal of what is no architecture has something to say."""
    from negengine.bench.architectures import ARCHITECTURES
    from negengine.models import NAMES

    if model not in NAMES:
        raise ValueError(
            f"only {' and '.join(ARCHITECTURES)} can be rehearsed; of a checkpoint nothing is known before it is loaded"
        )
    typer.echo(f"{model} is embedded and small: its run takes about half a minute on a CPU, and needs no rehearsal")
    return True


def check_same_machine(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError: the file's results would stand beside those of another machine or of other versions."""
    if found := apart(earlier, now):
        raise ValueError(
            f"the folder holds results of another machine or of other versions: {'; '.join(found)}; name another folder"
        )


def chosen(names: list[str] | None) -> tuple[str, ...]:
    """Raises ValueError: no method of that name."""
    from negengine.bench.whole import METHODS

    if not names:
        return ("negtome",)
    if names == ["all"]:
        return METHODS
    for name in names:
        if name not in METHODS:
            raise ValueError(f"--method must be of {', '.join(METHODS)}, or all; got {name!r}")
    return unique(names)
