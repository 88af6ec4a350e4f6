"""``negengine demo``: the embedded models without and with NegToMe, as a picture, a table and a JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from negengine import metrics
from negengine.cli.errors import one_line_errors
from negengine.cli.quiet import quiet_libraries
from negengine.cli.sheet import Row, sheet, stack
from negengine.diffusers.families import with_family_defaults
from negengine.environment import machine, versions
from negengine.methods import NegToMe

GROUP = 4
PROMPTS_A_CALL = 5


@one_line_errors
def demo(
    output: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("out/demo"),
    model: Annotated[list[str] | None, typer.Option(help="Embedded model; repeatable. All by default.")] = None,
    groups: Annotated[int, typer.Option(min=1, max=10, help="Prompts a model; a group of four images each.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the first image.")] = 0,
) -> None:
    """Draw the same seeds without and with NegToMe, on both embedded models."""
    from negengine import models

    console = Console()
    names = list(dict.fromkeys(model or models.NAMES))
    for name in names:
        models.path(name)  # a missing model is an error before anything is drawn
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    pages = []
    calls = -(-groups // PROMPTS_A_CALL)
    with Progress(console=console, transient=True) as progress:
        for name in names:
            task = progress.add_task(name, total=2 * calls + 1)
            numbers, rows = _measure(name, groups, seed, functools.partial(progress.advance, task))
            results[name] = numbers
            pages.append(sheet(f"{name}: the same seeds, without and with NegToMe", rows[::2]))
    picture, data = output / "demo.png", output / "demo.json"
    stack(pages).save(picture)
    result = {"date": time.strftime("%Y-%m-%d"), "seed": seed, "group_size": GROUP, "machine": machine(), "versions": versions()}
    data.write_text(json.dumps(result | {"models": results}, indent=1) + "\n")
    for name, numbers in results.items():
        console.print(_table(name, numbers))
    console.print(f"picture: {picture}\nnumbers: {data}", soft_wrap=True)


def _measure(name: str, groups: int, seed: int, advance: Any) -> tuple[dict[str, Any], list[Row]]:
    """Numbers of a model without and with NegToMe, and its rows; the two are drawn in turn."""
    from negengine import apply, models, remove, status

    quiet_libraries()
    pipe, classifier = models.load(name), models.load_classifier()
    settings = models.negtome_preset(name)
    prompts = list(models.PROMPTS[:groups])
    images: dict[str, list[Image.Image]] = {"without": [], "with": []}
    seconds = {"without": 0.0, "with": 0.0}
    merged = eligible = 0
    draw(pipe, name, prompts[:1], seed)  # warm-up
    advance()
    for start in range(0, groups, PROMPTS_A_CALL):
        part = prompts[start : start + PROMPTS_A_CALL]
        for case in ("without", "with"):
            if case == "with":
                apply(pipe, settings)
            begun = time.perf_counter()
            images[case] += draw(pipe, name, part, seed + start)
            seconds[case] += time.perf_counter() - begun
            if case == "with":
                report = status(pipe)[NegToMe]
                merged, eligible = merged + report.merged_tokens, eligible + report.eligible_tokens
                remove(pipe)
            advance()
    labels = torch.arange(groups).repeat_interleave(GROUP)
    numbers: dict[str, Any] = {}
    for case, drawn in images.items():
        features = classifier.features(drawn).split(GROUP)
        numbers[case] = {
            "pairwise_distance": float(torch.stack([metrics.pairwise_distance(f) for f in features]).mean()),
            "vendi_score": float(torch.stack([metrics.vendi_score(f) for f in features]).mean()),
            "fidelity": float(metrics.fidelity(classifier.logits(drawn), labels)),
            "seconds": seconds[case],
        }
    numbers["merged_share"] = merged / eligible if eligible else 0.0
    numbers["images"] = groups * GROUP
    numbers["settings"] = dataclasses.asdict(with_family_defaults(settings, pipe))
    numbers["call"] = models.preset(name).call_kwargs()
    rows = [
        Row(prompt, images["without"][i * GROUP : (i + 1) * GROUP], images["with"][i * GROUP : (i + 1) * GROUP])
        for i, prompt in enumerate(prompts)
    ]
    return numbers, rows


def draw(pipe: Any, name: str, prompts: list[str], seed: int) -> list[Image.Image]:
    """A group of images for every prompt, at the model's preset."""
    from negengine import models

    call = models.preset(name).call_kwargs(len(prompts))
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompts, num_images_per_prompt=GROUP, generator=generator, **call).images


def _table(name: str, numbers: dict[str, Any]) -> Table:
    table = Table(title=f"{name}: {numbers['images']} images in groups of {GROUP}, {_describe(name)}")
    for column in ("", "without", "with NegToMe"):
        table.add_column(column, justify="left" if not column else "right")
    rows = (
        ("pairwise feature distance", "pairwise_distance", "{:.3f}"),
        ("Vendi score", "vendi_score", "{:.3f}"),
        ("read as prompted", "fidelity", "{:.1%}"),
        ("seconds", "seconds", "{:.1f}"),
    )
    for label, key, form in rows:
        table.add_row(label, form.format(numbers["without"][key]), form.format(numbers["with"][key]))
    table.add_row("tokens merged", "", f"{numbers['merged_share']:.1%}")
    return table


def _describe(name: str) -> str:
    from negengine import models

    settings = models.negtome_preset(name)
    chosen = {f.name: getattr(settings, f.name) for f in dataclasses.fields(NegToMe)}
    return ", ".join(f"{key} {value}" for key, value in chosen.items() if value not in (None, getattr(NegToMe, key, None)))
