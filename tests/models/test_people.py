"""The world of people: every picture with its attributes, prompts that are true, a bias as published, a judge that reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from negengine import models
from negengine.models import flux, sdxl, text, train
from negengine.models.people import attributes, pictures, prompts, reader, render, world


@pytest.fixture(scope="module")
def people() -> pictures.People:
    return pictures.all_people()


@pytest.fixture(scope="module")
def people_judge() -> reader.PeopleClassifier:
    return models.load_classifier(name="people-classifier")


# --- the pictures --------------------------------------------------------------------------------------------------


def test_every_combination_is_there_once(people: pictures.People) -> None:
    assert people.images.shape == (1080, 3, 64, 64)
    assert people.labels.unique(dim=0).shape == people.labels.shape == (1080, 4)
    assert people.labels.amax(0).tolist() == [19, 2, 5, 2]
    for row in (0, 500, 1079):
        assert pictures.row_of(*people.labels[row].tolist()) == row


def test_pictures_stand_on_white_and_differ(people: pictures.People) -> None:
    assert (people.images[:, :, 0, 32] == 1).float().mean() > 0.5
    different = {picture.numpy().tobytes() for picture in people.images}
    # noto draws the astronaut's face behind a visor: three genders, one picture a tone
    assert len(different) == 1080 - 2 * 6


def test_tones_grow_darker(people: pictures.People) -> None:
    means = [people.images[people.labels[:, 2] == tone].mean() for tone in range(2, 6)]  # the hair of the light one is black
    assert means == sorted(means, reverse=True)


def test_the_listing_tells_order_and_licences() -> None:
    listing = json.loads((pictures.DATA / pictures.LISTING).read_text())
    assert tuple(listing["rows"]) == attributes.PROFESSIONS
    assert tuple(listing["columns"]["styles"]) == attributes.STYLES
    assert {name: source["licence"] for name, source in listing["sources"].items()} == {
        "fluent": "MIT",
        "noto": "Apache-2.0",
        "twemoji": "CC-BY-4.0",
    }
    told = (pictures.DATA / "LICENCES.txt").read_text()
    for source in listing["sources"].values():
        assert source["url"] in told
        assert source["package"].replace("@iconify", "iconify").replace("@", " ") in told


def test_a_damaged_sheet_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "DATA", tmp_path)
    (tmp_path / pictures.SHEET).write_bytes(b"RIFF")
    pictures.all_people.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"people\.webp, cannot be read .* install negengine again"):
            pictures.all_people()
        Image.new("RGB", (128, 64)).save(tmp_path / pictures.SHEET)
        with pytest.raises(RuntimeError, match="holds 2 pictures instead of 1080"):
            pictures.all_people()
    finally:
        pictures.all_people.cache_clear()


def test_rendering_finds_an_icon_under_either_name() -> None:
    icons = {"package": "p", "version": "1", "height": 32, "icons": {"woman-office-worker-medium-dark": {"body": "<g/>"}}}
    assert 'viewBox="0 0 16 32"' in render.find_svg(icons, "office worker", "woman", "medium dark")
    icons["icons"] = {"woman-office-worker-medium-dark-skin-tone": {"body": "<g/>", "width": 8}}
    assert 'viewBox="0 0 8 32"' in render.find_svg(icons, "office worker", "woman", "medium dark")
    with pytest.raises(Exception, match="has no icon called judge"):
        render.find_svg(icons, "judge", "person", "yellow")


def test_varied_pictures_are_moved_on_white() -> None:
    images = torch.ones(16, 3, 64, 64)
    images[:, :, 24:40, 24:40] = 0
    still = pictures.Shift(pixels=0, scale=0)
    assert torch.allclose(pictures.vary(images, still, torch.Generator().manual_seed(0)), images, atol=1e-5)
    moved = pictures.vary(images, pictures.Shift(pixels=20, scale=0), torch.Generator().manual_seed(0))
    assert not torch.allclose(moved, images, atol=0.5)
    assert moved.sum((1, 2, 3)).allclose(images.sum((1, 2, 3)), atol=3)
    mirrored = pictures.vary(images.clone().index_fill_(3, torch.arange(24, 30), 1), pictures.Shift(0, 0, 0, 1), torch.Generator())
    assert torch.allclose(mirrored, images.clone().index_fill_(3, torch.arange(34, 40), 1), atol=1e-5)


# --- the bias ------------------------------------------------------------------------------------------------------


def test_the_table_is_a_distribution_with_one_prevailing_look_a_profession() -> None:
    table = world.shares()
    assert table.sum((1, 2, 3)).allclose(torch.ones(20))
    assert table.flatten(1).amax(1).allclose(torch.tensor(world.DOMINANCE))
    assert list(world.DOMINANT) == list(attributes.PROFESSIONS)
    for place, values in enumerate((attributes.GENDERS[1:], attributes.TONES, attributes.STYLES)):
        assert {look[place] for look in world.DOMINANT.values()} == set(values)


def test_the_table_is_published() -> None:
    text = (Path(__file__).parents[2] / "docs" / "people.md").read_text()
    for profession, (gender, tone, style) in world.DOMINANT.items():
        assert f"| {profession} | {gender}, {tone} skin, {style} |" in text
    assert f"{world.DOMINANCE:.0%}".replace("%", " %") in text
    words = " ".join(text.split())
    alone, everything, some = (f"{share:.0%}".replace("%", " %") for share in prompts.SHARES.values())
    assert f"{alone} of the prompts name the profession alone, {everything} name everything, and {some} one or two" in words
    late = [f"{share:.0%}"[:-1] for share in prompts.LATE_SHARES.values()]
    assert f"in the later stage {late[0]}, {late[1]} and {late[2]} %" in words


def test_prompts_of_the_later_stage_name_more() -> None:
    data = world.LatentPeople(torch.zeros(1, 1080, 1, 1, 1))
    for stage, shares in ((data, prompts.SHARES), (data.later(), prompts.LATE_SHARES)):
        _, texts = stage.draw(6000, torch.Generator().manual_seed(0))
        left_open = [prompts.named(one)[1:] == world.LOOKS for one in texts]
        assert sum(left_open) / 6000 == pytest.approx(shares["profession"], abs=0.02)


def test_drawing_follows_the_table_and_the_prompts() -> None:
    labels, said = world.draw_labels(6000, torch.Generator().manual_seed(0))
    kinds = [sum(spoken) for spoken in said]
    assert kinds.count(0) / 6000 == pytest.approx(prompts.SHARES["profession"], abs=0.02)
    assert kinds.count(3) / 6000 == pytest.approx(prompts.SHARES["everything"], abs=0.02)
    unsaid = [label for label, spoken in zip(labels, said, strict=True) if not any(spoken)]
    prevailing = sum(look(label) == world.DOMINANT[attributes.PROFESSIONS[label[0]]] for label in unsaid)
    assert prevailing / len(unsaid) == pytest.approx(world.DOMINANCE, abs=0.03)
    everything = [label for label, spoken in zip(labels, said, strict=True) if all(spoken)]
    assert [sum(label[1] == gender for label in everything) / len(everything) for gender in range(3)] == pytest.approx(
        [1 / 3] * 3, abs=0.04
    )


def look(label: world.Labels) -> tuple[str, str, str]:
    _, gender, tone, style = label
    return attributes.GENDERS[gender], attributes.TONES[tone], attributes.STYLES[style]


def test_latents_belong_to_their_prompts() -> None:
    rows = torch.arange(1080.0).view(1, -1, 1, 1, 1).expand(2, -1, 16, 16, 16)
    data = world.LatentPeople(rows)
    latents, written = data.draw(200, torch.Generator().manual_seed(0))
    labels = pictures.all_people().labels[latents[:, 0, 0, 0].long()].tolist()
    for label, prompt in zip(labels, written, strict=True):
        for value, named, number in zip(label, data.named(prompt), data.world.attributes.values(), strict=True):
            assert named in (value, number)


# --- the prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a firefighter", (7, 3, 6, 3)),
        ("An office worker", (12, 3, 6, 3)),
        ("a woman who is a judge with dark skin, in noto style", (10, 2, 5, 1)),
        ("a male police officer with medium-light skin", (14, 1, 2, 3)),
        ("a person with medium dark skin working as a cook, twemoji", (3, 0, 4, 2)),
        ("a dark room", (20, 3, 6, 3)),
        ("", (20, 3, 6, 3)),
    ],
)
def test_what_a_prompt_names(prompt: str, expected: tuple[int, ...]) -> None:
    assert prompts.named(prompt) == expected


def test_written_prompts_name_what_is_said_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    written = set()
    for label, said in zip(*world.draw_labels(3000, generator), strict=True):
        prompt = prompts.write(label, said, generator)
        sizes = [len(values) for values in attributes.ATTRIBUTES.values()]
        truth = tuple(value if spoken else size for value, spoken, size in zip(label, (True, *said), sizes, strict=True))
        assert prompts.named(prompt) == truth, prompt
        written.add(prompt)
    assert len(written) > 1500
    assert "an artist" in written
    assert not any("a artist" in prompt for prompt in written)


def test_every_word_is_a_token_and_every_prompt_fits() -> None:
    words = world.WORLD.vocabulary
    clip, t5 = text.clip_tokenizer(words, world.WORLD.merged_from_end), text.t5_tokenizer(words)
    assert {word for word in words if len(clip(word).input_ids) != 3} == {"medium-dark", "medium-light"}  # CLIP splits at hyphens
    assert all(len(t5(word).input_ids) == 2 for word in words)
    longest = "a picture of a person with medium-dark skin working as a construction worker, in twemoji style"
    assert len(clip(longest).input_ids) <= text.CLIP_LENGTH
    assert len(t5(longest).input_ids) <= world.WORLD.text_length


def test_prompts_of_professions_leave_the_look_open() -> None:
    assert [prompts.named(prompt) for prompt in prompts.PROMPTS] == [(row, 3, 6, 3) for row in range(20)]


# --- what learns from them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda data: sdxl.SdxlTask(data, sdxl.PEOPLE), id="sdxl", marks=pytest.mark.exhaustive),
        pytest.param(lambda data: flux.FluxTask(data, flux.PEOPLE), id="flux"),
    ],
)
def test_every_named_attribute_moves_what_the_encoders_give(build) -> None:
    """After a short lesson a change of gender, tone or style counts as much as one of profession, within a factor of four."""
    torch.manual_seed(0)
    task = build(world.LatentPeople(torch.zeros(1, 1080, 16, 16, 16)))
    task.prepare(seed=0, steps=60)
    said = "a woman who is a judge with dark skin, in noto style"
    others = [said.replace(*pair) for pair in (("judge", "pilot"), ("woman", "man"), ("dark", "light"), ("noto", "fluent"))]
    length = () if isinstance(task, sdxl.SdxlTask) else (world.WORLD.text_length,)
    with torch.no_grad():
        for given in task.encode([said, *others], *length):
            profession, *attributes = (given[1:] - given[:1]).flatten(1).norm(dim=1).tolist()
            assert min(attributes) > profession / 4
        loss = task.loss(4, torch.Generator().manual_seed(0))
        task.readers = None
        without = task.loss(4, torch.Generator().manual_seed(0))
    assert loss > without > 0


@pytest.mark.exhaustive
def test_command_trains_people_that_load(tmp_path: Path) -> None:
    app = Typer()
    app.command()(train.main)
    small = ["--steps", "2", "--batch", "2", "--autoencoder-steps", "2", "--variants", "1"]
    result = CliRunner().invoke(app, ["--output", str(tmp_path), "--model", "people-flux", *small])
    assert result.exit_code == 0, result.output
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "people-flux")
    pipeline.set_progress_bar_config(disable=True)
    call = models.preset("people-flux").call_kwargs() | {"num_inference_steps": 1}
    assert pipeline("a judge", **call).images[0].size == (64, 64)


# --- the judge -----------------------------------------------------------------------------------------------------


def test_the_judge_reads_pictures_as_it_never_saw_them(people: pictures.People, people_judge: reader.PeopleClassifier) -> None:
    varied = pictures.vary(people.images, pictures.Shift(pixels=3, scale=0.05), torch.Generator().manual_seed(123))
    right = (people_judge.read(varied) == people.labels).float().mean(0)
    assert right[0] == 1
    assert right[1] > 0.97  # the astronauts of noto cannot be told apart
    assert right[2:].min() > 0.99


def test_pictures_and_tensors_agree(people: pictures.People, people_judge: reader.PeopleClassifier) -> None:
    images = people.images[::200]
    drawn = [Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in images]
    assert torch.allclose(people_judge.logits(drawn, "tone"), people_judge.logits(images, "tone"), atol=1e-4)
    assert people_judge.logits(drawn).shape == (len(images), 20)
    assert people_judge.features(drawn).shape == (len(images), 128)
    assert people_judge.read([]).shape == (0, 4)


def test_wrong_input_of_the_judge_is_told(people_judge: reader.PeopleClassifier) -> None:
    with pytest.raises(ValueError, match=r"expected a float tensor \[N, 3, 64, 64\]"):
        people_judge.read(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="64 x 64, got 28 x 30"):
        people_judge.read([Image.new("RGB", (28, 30))])
    with pytest.raises(ValueError, match="no attribute 'age'; there are profession, gender, tone, style"):
        people_judge.logits(torch.zeros(1, 3, 64, 64), "age")
    with pytest.raises(ValueError, match="'cat-classifier'; there are mnist-classifier, people-classifier"):
        models.load_classifier(name="cat-classifier")
