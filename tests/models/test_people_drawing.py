"""Whom the people models draw, as the classifier reads it: the profession that is asked for, nearly always in its prevailing look,
more looks with NegToMe, and every attribute that a prompt names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import negengine
from negengine import models
from negengine.models.people import measure, prompts
from negengine.models.people.reader import PeopleClassifier

SEED = 31
PEOPLE = pytest.mark.parametrize("name", models.PEOPLE, indirect=True)


@pytest.fixture(scope="module")
def judge() -> PeopleClassifier:
    return models.load_classifier(name="people-classifier")


def read(pipeline: DiffusionPipeline, judge: PeopleClassifier, name: str, texts: list[str], images: int) -> measure.Drawn:
    drawn = measure.draw(pipeline, name, texts, images, SEED)
    asked = [prompts.named(text) for text in texts for _ in range(images)]
    return measure.Drawn(judge.read(drawn), asked, judge.features(drawn))


@PEOPLE
def test_five_professions_without_and_with_negtome(pipeline: DiffusionPipeline, judge: PeopleClassifier, name: str) -> None:
    texts = list(prompts.PROMPTS[5:10])
    plain = measure.summary(read(pipeline, judge, name, texts, measure.GROUP))
    negengine.apply(pipeline, models.negtome_preset(name))
    spread = measure.summary(read(pipeline, judge, name, texts, measure.GROUP))
    negengine.remove(pipeline)
    assert plain["profession"] >= 0.9  # of 20 pictures
    assert spread["profession"] >= 0.85
    assert spread["distinct_looks"] > plain["distinct_looks"]


@PEOPLE
def test_a_prompt_is_followed(pipeline: DiffusionPipeline, judge: PeopleClassifier, name: str) -> None:
    texts = [
        "a woman who is a judge with dark skin, in noto style",
        "a man who is a judge with light skin, in twemoji style",
        "a woman working as a pilot with medium-light skin, in fluent style",
        "a man who is a singer with dark skin, in fluent style",
        "a woman who is a firefighter with medium skin, in twemoji style",
    ]
    found = measure.accuracy(read(pipeline, judge, name, texts, 2))
    assert min(found["profession"], found["style"]) >= 0.9, found
    assert found["tone_or_next"] >= 0.9, found
    assert found["man_or_woman"] >= 0.9, found


@pytest.mark.exhaustive
@PEOPLE
def test_every_profession_without_and_with_negtome(pipeline: DiffusionPipeline, judge: PeopleClassifier, name: str) -> None:
    plain, spread = (
        measure.summary(measure.open_looks(pipeline, judge, name, 2, SEED, negtome))
        for negtome in (None, models.negtome_preset(name))
    )
    assert plain["profession"] >= 0.95
    assert spread["profession"] >= 0.92
    assert plain["distinct_looks"] <= 3.0
    assert spread["distinct_looks"] >= plain["distinct_looks"] + 0.5


@pytest.mark.exhaustive
@PEOPLE
@pytest.mark.parametrize("everything", [True, False])
def test_what_is_named_is_drawn(pipeline: DiffusionPipeline, judge: PeopleClassifier, name: str, everything: bool) -> None:
    found = measure.accuracy(measure.named_looks(pipeline, judge, name, 120, SEED, everything))
    assert min(found["profession"], found["style"]) >= 0.95, found
    assert min(found["gender"], found["tone"]) >= 0.6, found  # by chance a third and a sixth


@PEOPLE
def test_committed_numbers_belong_to_the_presets(name: str) -> None:
    told = json.loads((models.path(name) / "fidelity.json").read_text())
    assert told["settings"] == models.preset(name).call_kwargs()
    assert told["negtome"] == measure.plain_settings(models.negtome_preset(name))
    assert told["without"]["distinct_looks"] <= 3.0
    assert told["with_negtome"]["distinct_looks"] >= told["without"]["distinct_looks"] + 0.5


@PEOPLE
def test_the_published_table_is_that_of_the_numbers(name: str) -> None:
    told = json.loads((models.path(name) / "fidelity.json").read_text())
    text = (Path(__file__).parents[2] / "docs" / "people.md").read_text()

    def percent(share: float) -> str:
        return f"{round(100 * share, 1):g} %"

    for key, words in (("everything_named", "everything is named"), ("one_thing_named", "one attribute is named")):
        shares = [told[key][which] for which in ("profession", "gender", "man_or_woman", "tone", "tone_or_next", "style")]
        assert f"| {name}, {words} | {' | '.join(map(percent, shares))} |" in text
    for key in ("distinct_looks", "distinct_genders", "distinct_tones", "distinct_styles"):
        pair = f"{told['without'][key]:.2f} | {told['with_negtome'][key]:.2f}"
        assert any(pair in line for line in text.splitlines() if line.startswith("| distinct")), (key, pair)
    assert f"{name} {told['frechet']['distance']:.1f}" in text


def test_the_frechet_distance_of_known_normals() -> None:
    points = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]).repeat(50, 1)
    variance = points.double().T.cov()[0, 0].item()
    assert measure.frechet_distance(points, points) == pytest.approx(0, abs=1e-9)
    assert measure.frechet_distance(points, points + torch.tensor([3.0, 4.0])) == pytest.approx(25, rel=1e-6)
    assert measure.frechet_distance(points, 3 * points) == pytest.approx(2 * (2**2) * variance, rel=1e-6)


def test_a_neighbouring_tone_and_the_look_without_a_gender_are_told_apart_from_what_is_wrong() -> None:
    asked = [(0, 1, 3, 0), (0, 2, 0, 0), (0, 1, 1, 3), (0, 0, 6, 0)]  # a man of medium skin, a yellow woman, a light man, a person
    read = torch.tensor([[0, 0, 4, 0], [0, 1, 1, 0], [0, 1, 3, 0], [0, 2, 5, 0]])
    found = measure.accuracy(measure.Drawn(read, asked, torch.zeros(4, 1)))
    assert found["tone"] == 0
    assert found["tone_or_next"] == pytest.approx(1 / 3, abs=1e-4)  # yellow has no neighbour, and light is two from medium
    assert found["man_or_woman"] == pytest.approx(2 / 3, abs=1e-4)  # the woman was read as a man
    nothing = measure.accuracy(measure.Drawn(read, [(0, 3, 6, 3)] * 4, torch.zeros(4, 1)))
    assert not {"tone_or_next", "man_or_woman"} & nothing.keys()
