"""What NegToMe does to the people models over its settings: the grid behind their presets, and pictures to look at.

``python bench/people.py grid --model people-flux`` writes ``bench/results/people/grid-people-flux.json``; each line is one setting,
over groups of four of every profession. ``python bench/people.py sheet --model people-flux`` draws the same seeds without and with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

import negengine
from negengine import NegToMe, models
from negengine.models.people import measure, prompts
from negengine.models.people.attributes import SIZE

RESULTS = Path(__file__).parent / "results" / "people"
SEED = 5000
"""Apart from the seeds of the models' fidelity.json, which report what was chosen here."""

GUIDANCE = {"people-flux": (2.0, 3.0), "people-sdxl": (2.0, 3.0)}
NEGTOME = {
    "people-flux": [
        NegToMe(alpha=alpha, threshold=threshold, reference="others", timesteps=(low, 1000))
        for alpha, threshold, low in ((1.0, 0.3, 800), (1.5, 0.3, 800), (1.5, 0.5, 800), (2.0, 0.3, 850), (4.0, 0.3, 900))
    ],
    "people-sdxl": [
        NegToMe(alpha=alpha, reference="others", timesteps=(low, 1000), blocks=("*",), min_grid=8)
        for alpha, low in ((1.5, 800), (3.0, 800), (4.5, 800), (4.5, 900))
    ],
}

app = typer.Typer(add_completion=False)
GUIDANCE_KEY = {"people-flux": "true_cfg_scale", "people-sdxl": "guidance_scale"}


@app.command()
def grid(
    model: Annotated[str, typer.Option(help="Which model.")],
    groups: Annotated[int, typer.Option(min=1, help="Groups of four for each profession.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder of the JSON file.")] = RESULTS,
) -> None:
    """Without and with each setting of NegToMe at each guidance scale."""
    torch.set_grad_enabled(False)
    pipeline, judge = models.load(model), models.load_classifier(name="people-classifier")
    lines = []
    for guidance in GUIDANCE[model]:
        for negtome in (None, *NEGTOME[model]):
            changes = {GUIDANCE_KEY[model]: guidance}
            found = measure.summary(measure.open_looks(pipeline, judge, model, groups, SEED, negtome, **changes))
            told = None if negtome is None else {key: getattr(negtome, key) for key in ("alpha", "threshold", "timesteps")}
            lines.append({"guidance": guidance, "negtome": told, **found})
            typer.echo(json.dumps(lines[-1]))
    output.mkdir(parents=True, exist_ok=True)
    (output / f"grid-{model}.json").write_text(json.dumps({"model": model, "seed": SEED, "lines": lines}, indent=1) + "\n")


@app.command()
def sheet(
    model: Annotated[str, typer.Option(help="Which model.")],
    output: Annotated[Path, typer.Option(help="PNG file.")],
    seed: Annotated[int, typer.Option(help="Seed of the first prompts.")] = 0,
    scale: Annotated[int, typer.Option(help="Enlargement.")] = 1,
) -> None:
    """A row a profession: four pictures without NegToMe, then the same seeds with it."""
    pipeline = models.load(model)
    texts = list(prompts.PROMPTS)
    without = measure.draw(pipeline, model, texts, measure.GROUP, seed)
    negengine.apply(pipeline, models.negtome_preset(model))
    after = measure.draw(pipeline, model, texts, measure.GROUP, seed)
    page = Image.new("RGB", (SIZE * (2 * measure.GROUP + 1), SIZE * len(texts)), "white")
    for place, picture in enumerate(without + after):
        half, rest = divmod(place, len(without))
        row, column = divmod(rest, measure.GROUP)
        page.paste(picture, ((column + half * (measure.GROUP + 1)) * SIZE, row * SIZE))
    page.resize((page.width * scale, page.height * scale), Image.Resampling.LANCZOS).save(output)


if __name__ == "__main__":
    app()
