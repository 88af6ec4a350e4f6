"""``python -m negengine.models.people.measure``: does a model draw who is asked for, and how alike are those it may choose?

The classifier reads every picture. What it reads is counted in groups of four, which is what NegToMe spreads, and the pictures'
features are compared with those of the training world.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from negengine import models
from negengine.methods import NegToMe
from negengine.methods.plain import as_plain
from negengine.models.people import prompts
from negengine.models.people.attributes import ATTRIBUTES, GENDERS, PROFESSIONS, TONES
from negengine.models.people.pictures import Shift, all_people, row_of, vary
from negengine.models.people.reader import PeopleClassifier
from negengine.models.people.world import DOMINANT, draw_labels, draw_look, look_names

GROUP = 4
PROMPTS_A_CALL = 5
SEED_OF_THE_WORLD = 977


@dataclass(frozen=True)
class Drawn:
    """Attributes ``[N, 4]`` that were read, those that were asked for, and the features ``[N, F]``."""

    read: Tensor
    asked: Sequence[tuple[int, ...]]
    features: Tensor


def main(
    model: Annotated[str, typer.Option(help="Which model.")],
    groups: Annotated[int, typer.Option(min=1, help="Groups of four for each profession.")] = 3,
    named: Annotated[int, typer.Option(min=1, help="Pictures whose prompts name all, and whose prompts name one thing.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the first call; each call adds one.")] = 1000,
    output: Annotated[Path | None, typer.Option(help="JSON file; the model's fidelity.json by default.")] = None,
) -> None:
    """Draw, read and write what is needed to repeat it."""
    pipeline, judge = models.load(model), models.load_classifier(name="people-classifier")
    torch.set_grad_enabled(False)
    plain = open_looks(pipeline, judge, model, groups, seed)
    report: dict[str, Any] = {
        "model": model,
        "settings": models.preset(model).call_kwargs(),
        "negtome": plain_settings(models.negtome_preset(model)),
        "seed": seed,
        "groups_a_profession": groups,
        "versions": _versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU threads, float32",
        "classifier_on_real_pictures": _real_accuracy(judge),
        "without": summary(plain),
        "with_negtome": summary(open_looks(pipeline, judge, model, groups, seed, models.negtome_preset(model))),
        "everything_named": accuracy(named_looks(pipeline, judge, model, named, seed, everything=True)),
        "one_thing_named": accuracy(named_looks(pipeline, judge, model, named, seed, everything=False)),
        "frechet": frechet_to_world(judge, plain),
    }
    target = output or models.path(model) / "fidelity.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    typer.echo(json.dumps(report))


def draw(pipeline: DiffusionPipeline, model: str, texts: list[str], images: int, seed: int, **changes: Any) -> list[Image.Image]:
    """``images`` pictures of each prompt, in calls of a few prompts; each call has the next seed."""
    pictures: list[Image.Image] = []
    for call, start in enumerate(range(0, len(texts), PROMPTS_A_CALL)):
        part = texts[start : start + PROMPTS_A_CALL]
        settings = models.preset(model).call_kwargs(len(part)) | changes
        generator = torch.Generator().manual_seed(seed + call)
        pictures += pipeline(part, num_images_per_prompt=images, generator=generator, **settings).images
    return pictures


def open_looks(
    pipeline: DiffusionPipeline,
    judge: PeopleClassifier,
    model: str,
    groups: int,
    seed: int,
    negtome: NegToMe | None = None,
    **changes: Any,
) -> Drawn:
    """Groups of four pictures of each profession, whose prompt leaves the look open, perhaps with NegToMe."""
    import negengine

    texts = list(prompts.PROMPTS) * groups
    if negtome is not None:
        negengine.apply(pipeline, negtome)
    try:
        pictures = draw(pipeline, model, texts, GROUP, seed, **changes)
    finally:
        negengine.remove(pipeline)
    asked = [prompts.named(text) for text in texts for _ in range(GROUP)]
    return Drawn(judge.read(pictures), asked, judge.features(pictures))


def named_looks(
    pipeline: DiffusionPipeline, judge: PeopleClassifier, model: str, number: int, seed: int, everything: bool, **changes: Any
) -> Drawn:
    """One picture for each of ``number`` random prompts that name everything, or the profession and one attribute."""
    generator = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    while len(texts) < number:
        (label,), (said,) = draw_labels(1, generator)
        if sum(said) == (3 if everything else 1):
            texts.append(prompts.write(label, said, generator))
    pictures = draw(pipeline, model, texts, 1, seed, **changes)
    return Drawn(judge.read(pictures), [prompts.named(text) for text in texts], judge.features(pictures))


def accuracy(drawn: Drawn) -> dict[str, Any]:
    """Share of the pictures in which each attribute that the prompt names was read as named."""
    report: dict[str, Any] = {"pictures": len(drawn.asked)}
    for place, (name, values) in enumerate(ATTRIBUTES.items()):
        rows = [row for row, asked in enumerate(drawn.asked) if asked[place] < len(values)]
        right = [bool(drawn.read[row, place] == drawn.asked[row][place]) for row in rows]
        if rows:
            report[name] = round(sum(right) / len(rows), 4)
    return report | _nearly(drawn)


def _nearly(drawn: Drawn) -> dict[str, Any]:
    """Where a tone is named, the share read as it or as the next lighter or darker one; man or woman, as not the other of both.

    Emoji of neighbouring tones differ by a shade, and "person" looks like a man or a woman in many.
    """
    pairs = [(asked, read) for asked, read in zip(drawn.asked, drawn.read.tolist(), strict=True)]
    tones = [(asked[2], read[2]) for asked, read in pairs if asked[2] < len(TONES)]
    sexes = [(asked[1], read[1]) for asked, read in pairs if asked[1] in (GENDERS.index("man"), GENDERS.index("woman"))]
    yellow = TONES.index("yellow")
    report = {}
    if tones:
        near = (asked == read or (yellow not in (asked, read) and abs(asked - read) == 1) for asked, read in tones)
        report["tone_or_next"] = round(sum(near) / len(tones), 4)
    if sexes:
        others = (asked != read and GENDERS[read] != "person" for asked, read in sexes)
        report["man_or_woman"] = round(1 - sum(others) / len(sexes), 4)
    return report


def summary(drawn: Drawn) -> dict[str, Any]:
    """Professions as prompted, and distinct values within groups of four, as means over the groups."""
    looks = [tuple(each) for each in drawn.read[:, 1:].tolist()]
    groups = [looks[start : start + GROUP] for start in range(0, len(looks), GROUP)]
    prevailing = [look_names(look) == DOMINANT[PROFESSIONS[asked[0]]] for look, asked in zip(looks, drawn.asked, strict=True)]
    return {
        "pictures": len(looks),
        "profession": accuracy(drawn)["profession"],
        "distinct_looks": _mean(len(set(group)) for group in groups),
        "distinct_genders": _mean(len({look[0] for look in group}) for group in groups),
        "distinct_tones": _mean(len({look[1] for look in group}) for group in groups),
        "distinct_styles": _mean(len({look[2] for look in group}) for group in groups),
        "prevailing_look": _mean(prevailing),
    }


def frechet_to_world(judge: PeopleClassifier, drawn: Drawn) -> dict[str, Any]:
    """Fréchet distance, on the classifier's features, of the pictures to as many of the world that the same prompts describe.

    ``floor`` is that of another equal number of pictures of the world: what a perfect model would have.
    """
    number = len(drawn.asked)
    professions = [asked[0] for asked in drawn.asked]
    first, second = (judge.features(world_pictures(professions, SEED_OF_THE_WORLD + i)) for i in range(2))
    return {
        "pictures": number,
        "distance": round(frechet_distance(drawn.features, first), 3),
        "floor": round(frechet_distance(second, first), 3),
    }


def world_pictures(professions: list[int], seed: int) -> Tensor:
    """Varied training pictures of these professions, their looks as the biased table has them."""
    generator = torch.Generator().manual_seed(seed)
    rows = [row_of(*draw_look(profession, (None, None, None), generator)) for profession in professions]
    return vary(all_people().images[torch.tensor(rows)], Shift(), generator)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Of two sets of features ``[N, F]``, taken as normal: ``|m - n|² + tr(A + B - 2 (A B)^½)``."""
    a, b = a.double(), b.double()
    first, second = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross)


def _real_accuracy(judge: PeopleClassifier) -> dict[str, float]:
    people = all_people()
    varied = vary(people.images, Shift(pixels=3, scale=0.05), torch.Generator().manual_seed(0))
    right = (judge.read(varied) == people.labels).double().mean(0)
    return {name: round(float(share), 4) for name, share in zip(ATTRIBUTES, right, strict=True)}


def _mean(values: Iterable[float]) -> float:
    each = [float(value) for value in values]
    return round(sum(each) / len(each), 3)


def plain_settings(negtome: NegToMe) -> dict[str, Any]:
    """Settings as JSON has them."""
    return json.loads(json.dumps(as_plain(negtome)))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "transformers", "tokenizers")}


if __name__ == "__main__":
    typer.run(main)
