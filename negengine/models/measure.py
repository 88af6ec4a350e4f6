"""``python -m negengine.models.measure``: how faithfully a model draws what its prompt says, judged by the classifier."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from negengine import models
from negengine.models.classifier import Classifier
from negengine.models.digits import CLASSES

BATCH = 50


def main(
    model: Annotated[str, typer.Option(help="Which model.")],
    per_class: Annotated[int, typer.Option(min=1, help="Samples of each specified prompt.")] = 100,
    open_samples: Annotated[int, typer.Option(min=0, help="Samples of the prompt 'a digit'.")] = 1000,
    long_per_class: Annotated[int, typer.Option(min=0, help="Samples a class with 512 text tokens (FLUX only).")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the first batch; each batch adds one.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file; the model's fidelity.json by default.")] = None,
) -> None:
    """Draw, judge and write the confusion matrix (rows: prompted, columns: read) with everything needed to repeat it."""
    pipeline, judge = models.load(model), models.load_classifier()
    settings = models.preset(model).call_kwargs()
    images, labels = models.heldout_digits()
    report: dict[str, Any] = {
        "model": model,
        "settings": settings,
        "seed": seed,
        "batch": BATCH,
        "versions": _versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU threads, float32",
        "classifier_on_real_digits": (judge.logits(images).argmax(1) == labels).float().mean().item(),
    }
    report["specified"] = specified(pipeline, judge, settings, per_class, seed)
    if open_samples:
        report["open"] = {
            "prompt": "a digit",
            "histogram": count(pipeline, judge, "a digit", open_samples, settings, seed),
        }
    if long_per_class:
        report["specified_512_text_tokens"] = specified(
            pipeline, judge, settings | {"max_sequence_length": 512}, long_per_class, seed
        )
    target = output or models.path(model) / "fidelity.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    typer.echo(json.dumps(report))


def specified(
    pipeline: DiffusionPipeline, judge: Classifier, settings: dict[str, Any], per_class: int, seed: int
) -> dict[str, Any]:
    """Fidelity over the ten prompts, one a class."""
    start = time.perf_counter()
    confusion = [count(pipeline, judge, prompt, per_class, settings, seed + 1000 * i) for i, prompt in enumerate(models.PROMPTS)]
    samples = per_class * CLASSES
    return {
        "prompts": list(models.PROMPTS),
        "samples": samples,
        "right": sum(confusion[digit][digit] for digit in range(CLASSES)) / samples,
        "confusion": confusion,
        "milliseconds_a_sample": round(1000 * (time.perf_counter() - start) / samples, 1),
    }


def count(
    pipeline: DiffusionPipeline, judge: Classifier, prompt: str, samples: int, settings: dict[str, Any], seed: int
) -> list[int]:
    """How often each digit is read in pictures of a prompt."""
    read = judge.logits(draw(pipeline, prompt, samples, settings, seed)).argmax(1)
    return torch.bincount(read.cpu(), minlength=CLASSES).tolist()


def draw(pipeline: DiffusionPipeline, prompt: str, samples: int, settings: dict[str, Any], seed: int) -> list[Image.Image]:
    """Pictures of a prompt, in batches with a seed each."""
    pictures: list[Image.Image] = []
    for i, start in enumerate(tqdm(range(0, samples, BATCH), desc=prompt, leave=False)):
        generator = torch.Generator().manual_seed(seed + i)
        number = min(BATCH, samples - start)
        pictures += pipeline(prompt, num_images_per_prompt=number, generator=generator, **settings).images
    return pictures


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "transformers", "tokenizers")}


if __name__ == "__main__":
    typer.run(main)
