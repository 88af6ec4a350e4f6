"""``python -m negengine.models.train``: train the embedded models from the digits, on a CPU."""

from __future__ import annotations

import dataclasses
import json
import logging
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import save_file

from negengine.models import autoencoder, classifier, flux, manifest, sdxl
from negengine.models.dataset import VARIANTS, GeneratorTask, LatentDigits
from negengine.models.digits import split
from negengine.models.training import Recipe, train


class Model(str, Enum):
    """What can be trained."""

    FLUX = "mnist-flux"
    SDXL = "mnist-sdxl"
    CLASSIFIER = "mnist-classifier"
    ALL = "all"


TASKS: dict[Model, tuple[type[GeneratorTask], Recipe]] = {
    Model.FLUX: (flux.FluxTask, flux.RECIPE),
    Model.SDXL: (sdxl.SdxlTask, sdxl.RECIPE),
}


def main(
    output: Annotated[Path, typer.Option(help="Folder for the checkpoints; resume files go to its folder 'resume'.")],
    model: Annotated[Model, typer.Option(help="What to train.")] = Model.ALL,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps, instead of the recipe's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images a step, instead of the recipe's.")] = None,
    autoencoder_steps: Annotated[int, typer.Option(min=1, help="Steps of the shared autoencoder.")] = autoencoder.RECIPE.steps,
    variants: Annotated[int, typer.Option(min=1, help="Varied versions of each digit.")] = VARIANTS,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train. Ctrl-C stops after the current step; the same command continues to the same bits."""
    chosen = [each for each in Model if each is not Model.ALL] if model is Model.ALL else [model]
    resume = output / "resume"
    try:
        for each in chosen:
            folder = output / each.value
            if each is Model.CLASSIFIER:
                train_classifier(folder, resume, _adapt(classifier.RECIPE, steps, batch, seed))
                continue
            vae = train_autoencoder(resume, _adapt(autoencoder.RECIPE, autoencoder_steps, batch, seed))
            train_generator(each, folder, resume, vae, variants, _adapt(TASKS[each][1], steps, batch, seed))
    except KeyboardInterrupt as stop:
        typer.echo(f"\n{stop}", err=True)
        raise typer.Exit(130) from None
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _adapt(recipe: Recipe, steps: int | None, batch: int | None, seed: int) -> Recipe:
    return dataclasses.replace(recipe, steps=steps or recipe.steps, batch=batch or recipe.batch, seed=seed)


def train_autoencoder(resume: Path, recipe: Recipe) -> AutoencoderKL:
    """The shared autoencoder; at once if it is trained already."""
    digits = split("generator")
    torch.manual_seed(recipe.seed)
    task = autoencoder.AutoencoderTask(digits)
    vae = train(task, recipe, resume / "autoencoder.pt", name="autoencoder").vae
    autoencoder.standardise(vae, digits.images)
    return vae


def train_generator(name: Model, folder: Path, resume: Path, vae: AutoencoderKL, variants: int, recipe: Recipe) -> None:
    """Train one model and save its pipeline."""
    digits = LatentDigits.of(vae, split("generator"), variants, recipe.seed)
    torch.manual_seed(recipe.seed)
    task = TASKS[name][0](digits)
    task.prepare(recipe.seed)
    average = train(task, recipe, resume / f"{name.value}.pt", name=name.value)
    save_pipeline(average.pipeline(vae), folder)


def train_classifier(folder: Path, resume: Path, recipe: Recipe) -> None:
    """Train the judge and save it in 16 bit."""
    torch.manual_seed(recipe.seed)
    task = classifier.ClassifierTask(split("classifier"))
    average = train(task, recipe, resume / f"{Model.CLASSIFIER.value}.pt", name=Model.CLASSIFIER.value)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in average.classifier.state_dict().items()}
    save_file(weights, folder / classifier.FILE)
    manifest.write(folder)


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save in 16 bit, in the layout of ``save_pretrained``, with a manifest.

    The text encoders' configs are made to say float32: transformers loads in the type that the config names, diffusers in
    float32, and a pipeline of two types fails at its first linear layer.
    """
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.half()
    pipeline.save_pretrained(folder)
    for config in folder.glob("text_encoder*/config.json"):
        settings = json.loads(config.read_text())
        config.write_text(json.dumps(settings | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    manifest.write(folder)


if __name__ == "__main__":
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    typer.run(main)
