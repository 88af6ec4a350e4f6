"""``python -m negengine.models.train``: train the embedded models from the digits and the people, on a CPU."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import save_file

from negengine.models import autoencoder, classifier, flux, manifest, sdxl
from negengine.models.dataset import VARIANTS, DigitPictures, GeneratorTask
from negengine.models.digits import split
from negengine.models.people import reader
from negengine.models.people.pictures import all_people
from negengine.models.people.world import PeoplePictures
from negengine.models.training import Recipe, train
from negengine.models.world import Latents, Pictures


class Model(str, Enum):
    """What can be trained."""

    FLUX = "mnist-flux"
    SDXL = "mnist-sdxl"
    CLASSIFIER = "mnist-classifier"
    PEOPLE_FLUX = "people-flux"
    PEOPLE_SDXL = "people-sdxl"
    PEOPLE_CLASSIFIER = "people-classifier"
    ALL = "all"


@dataclass(frozen=True)
class Source:
    """The pictures of a world, and the recipe and resume file of its autoencoder."""

    pictures: Callable[[], Pictures]
    autoencoder: Recipe
    resume: str


DIGITS = Source(lambda: DigitPictures(split("generator")), autoencoder.RECIPE, "autoencoder.pt")
PEOPLE = Source(lambda: PeoplePictures(all_people()), autoencoder.PEOPLE_RECIPE, "people-autoencoder.pt")


@dataclass(frozen=True)
class Plan:
    """How a model is trained: on ``recipe``, and then, with the prompts of a later stage, on ``later``. Either may be left out."""

    source: Source
    build: Callable[[Latents], GeneratorTask]
    recipe: Recipe | None
    later: Recipe | None = None


TASKS: dict[Model, Plan] = {
    Model.FLUX: Plan(DIGITS, flux.FluxTask, flux.RECIPE),
    Model.SDXL: Plan(DIGITS, sdxl.SdxlTask, sdxl.RECIPE),
    Model.PEOPLE_FLUX: Plan(PEOPLE, functools.partial(flux.FluxTask, shape=flux.PEOPLE), flux.PEOPLE_RECIPE, flux.PEOPLE_LATER),
    Model.PEOPLE_SDXL: Plan(PEOPLE, functools.partial(sdxl.SdxlTask, shape=sdxl.PEOPLE), None, later=sdxl.PEOPLE_RECIPE),
}

JUDGES: dict[Model, tuple[Callable[[], classifier.ClassifierTask | reader.ReaderTask], Recipe]] = {
    Model.CLASSIFIER: (lambda: classifier.ClassifierTask(split("classifier")), classifier.RECIPE),
    Model.PEOPLE_CLASSIFIER: (lambda: reader.ReaderTask(all_people()), reader.RECIPE),
}


def main(
    output: Annotated[Path, typer.Option(help="Folder for the checkpoints; resume files go to its folder 'resume'.")],
    model: Annotated[Model, typer.Option(help="What to train.")] = Model.ALL,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps, instead of the recipe's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images a step, instead of the recipe's.")] = None,
    autoencoder_steps: Annotated[int | None, typer.Option(min=1, help="Steps of the shared autoencoder, likewise.")] = None,
    variants: Annotated[int, typer.Option(min=1, help="Varied versions of each picture.")] = VARIANTS,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train. Ctrl-C stops after the current step; the same command continues to the same bits."""
    chosen = [each for each in Model if each is not Model.ALL] if model is Model.ALL else [model]
    resume = output / "resume"
    try:
        for each in chosen:
            folder = output / each.value
            if each in JUDGES:
                train_classifier(each, folder, resume, _adapt(JUDGES[each][1], steps, batch, seed))
                continue
            plan = TASKS[each]
            vae = train_autoencoder(plan.source, resume, _adapt(plan.source.autoencoder, autoencoder_steps, batch, seed))
            recipes = [recipe and _adapt(recipe, steps, batch, seed) for recipe in (plan.recipe, plan.later)]
            train_generator(each, folder, resume, vae, variants, seed, *recipes)
    except KeyboardInterrupt as stop:
        typer.echo(f"\n{stop}", err=True)
        raise typer.Exit(130) from None
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _adapt(recipe: Recipe, steps: int | None, batch: int | None, seed: int) -> Recipe:
    return dataclasses.replace(recipe, steps=steps or recipe.steps, batch=batch or recipe.batch, seed=seed)


def train_autoencoder(source: Source, resume: Path, recipe: Recipe) -> AutoencoderKL:
    """The autoencoder that the models of a world share; at once if it is trained already."""
    pictures = source.pictures()
    torch.manual_seed(recipe.seed)
    task = autoencoder.AutoencoderTask(pictures)
    file = resume / source.resume
    vae = train(task, recipe, file, name=file.stem).vae
    autoencoder.standardise(vae, pictures.everything(), pictures.world.channelwise)
    return vae


def train_generator(
    name: Model,
    folder: Path,
    resume: Path,
    vae: AutoencoderKL,
    variants: int,
    seed: int,
    recipe: Recipe | None,
    later: Recipe | None,
) -> None:
    """Train one model and save its pipeline. A later stage starts from the averaged weights of the first."""
    data = TASKS[name].source.pictures().latents(vae, variants, seed)
    torch.manual_seed(seed)
    task = TASKS[name].build(data)
    task.prepare(seed)
    if recipe is not None:
        average = train(task, recipe, resume / f"{name.value}.pt", name=name.value)
        task.load_state_dict(average.state_dict())
    if later is not None:
        task.data = data.later()
        average = train(task, later, resume / f"{name.value}-later.pt", name=f"{name.value}, later")
        task.load_state_dict(average.state_dict())
    save_pipeline(task.pipeline(vae), folder)


def train_classifier(name: Model, folder: Path, resume: Path, recipe: Recipe) -> None:
    """Train a judge and save it in 16 bit."""
    torch.manual_seed(recipe.seed)
    average = train(JUDGES[name][0](), recipe, resume / f"{name.value}.pt", name=name.value)
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
