"""``negengine negative`` as a user types it, on an embedded model with the embedded classifier."""

import importlib

import pytest
from PIL import Image
from typer.testing import CliRunner

from negengine import models, png
from negengine.cli import app
from negengine.evaluate import people
from negengine.evaluate.worlds import world_of

runner = CliRunner()


def negative(tmp_path, *arguments, model="mnist-sdxl", captioner="classifier"):
    command = ("negative", "--model", model, "--captioner", captioner, "--output", tmp_path / "out", "--steps", 2, *arguments)
    return runner.invoke(app, [str(a) for a in command])


@pytest.mark.parametrize("model", models.DIGITS)
def test_one_command_draws_captions_and_draws_again(tmp_path, model):
    call = ("a handwritten 3", "one", "--count", 2, "--seed", 7, "--negative-prompt", "thin", "--guidance", 2.5)
    result = negative(tmp_path, *call, model=model)
    assert result.exit_code == 0, result.output
    paths = sorted((tmp_path / "out").glob("*.png"))
    names = [
        f"{p}-seed{seed}-{what}.png" for p in ("00-a-handwritten-3", "01-one") for seed in (7, 8) for what in ("00", "negative")
    ]
    assert [path.name for path in paths] == names
    assert "8 images in" in result.output
    classifier = world_of(model).captioner()
    for image, picture in zip(paths[::2], paths[1::2], strict=True):
        told = png.read(image)
        caption = classifier(Image.open(picture))
        assert told["caption"] == caption in (people.EVERYTHING if model.startswith("people") else models.PROMPTS)
        assert f"{told['prompt']!r}, seed {told['seed']}: the negative image shows {caption!r}" in result.output
        assert told["negative_prompt"] == f"thin, {caption}"
        assert (told["dnp"]["steps"], told["dnp"]["guidance"]) == (2, 2.5)
    assert len(list((tmp_path / "out" / "captions").glob("*.json"))) == 4


def test_a_run_that_was_stopped_goes_on_from_its_captions(tmp_path):
    assert negative(tmp_path, "one").exit_code == 0
    result = negative(tmp_path, "one")
    assert result.exit_code == 2
    assert "exists; choose another --output or --seed" in result.output
    first = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    for path in first:
        path.unlink()
    for path in (tmp_path / "out" / "captions").glob("*.json"):  # as if it had been another caption
        path.write_text(path.read_text().replace('"caption": "', '"caption": "kept '))
    assert "shows 'kept a handwritten" in negative(tmp_path, "one").output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("one", "--guidance", 1), "--guidance must be above 1, got 1"),
        (("one", "--negative-guidance", "nan"), "--negative-guidance must be above 1"),
        (("one", "--dtype", "float8"), "--dtype must be one of"),
        (("one", "--device", "nope"), "--device nope cannot be used"),
        (("one", "--captioner", "person"), "the standard input is none; give --captioner classifier"),
        (("one", "--captioner", "nope"), "no captioner 'nope': give person, classifier"),
        (("one", "--captioner-prompt", "say"), "--captioner classifier takes none"),
        (("one", "--model", "no such model"), "--captioner classifier reads the pictures of the embedded models"),
        (("one", "--method", "dnp"), "`negengine negative` does that"),
        (("one", "--method", "dng"), "dng needs prompt: give --avoid TEXT"),
        (("one", "--avoid", "two"), "--avoid is for a method that avoids a prompt"),
        (("one", "--method", "dng", *("--avoid", "two") * 2), "--avoid is given 2 times; this command takes one text"),
        (("one", *("--negative-prompt", "two") * 2), "--negative-prompt is given 2 times"),
        (("one", "--set", "cads.tau1=0.5"), "cads is not chosen; add --method cads"),
        (("one", "--model", "mnist-flux", "--method", "cads"), "leave it out: true CFG is what avoids the caption"),
        (("one", "--height", 64), "it reads digits of 32 x 32 pixels, and the picture has 32 x 64"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    result = negative(tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list((tmp_path / "out").glob("0*.png"))


def test_a_picture_that_was_not_captioned_is_there_to_look_at(tmp_path):
    result = negative(tmp_path, "one", "--height", 64)
    (path,) = (tmp_path / "out").glob("*.png")
    assert str(path) in result.output
    assert png.read(path)["prompt"] == "one"
    assert Image.open(path).size == (32, 64)


@pytest.mark.parametrize("model", models.DIGITS)
def test_final_pictures_can_be_repeated_with_their_methods(tmp_path, model):
    result = negative(tmp_path, "one", "two", "--count", 2, "--method", "negtome", model=model)
    assert result.exit_code == 0, result.output
    picture = tmp_path / "out" / "01-two-seed1-00.png"
    told = png.read(picture)
    assert told["run"]["call"]["negative_prompt"][1] == told["caption"]
    assert told["run"]["methods"][0]["group_size"] == 2
    plain = negative(tmp_path / "plain", "two", "--count", 2, "--method", "none", model=model)
    assert plain.exit_code == 0, plain.output
    without = Image.open(tmp_path / "plain" / "out" / "00-two-seed1-00.png").tobytes()
    assert without != Image.open(picture).tobytes()
    again = runner.invoke(app, ["generate", "--like", str(picture), "--output", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    assert "01-two-seed1-00.png has exactly the pixels of" in again.output
    assert Image.open(tmp_path / "again" / "01-two-seed1-00.png").tobytes() == Image.open(picture).tobytes()


def test_the_final_pictures_avoid_a_prompt_too(tmp_path):
    avoiding = ("--method", "dng", "--avoid", "a handwritten three", "--scheduler", "EulerAncestralDiscreteScheduler")
    result = negative(tmp_path, "one", *avoiding)
    assert result.exit_code == 0, result.output
    picture = tmp_path / "out" / "00-one-seed0-00.png"
    run = png.read(picture)["run"]
    assert (run["scheduler"], run["methods"][0]["prompt"]) == (avoiding[-1], "a handwritten three")
    again = runner.invoke(app, ["generate", "--like", str(picture), "--output", str(tmp_path / "again")])
    assert "00-one-seed0-00.png has exactly the pixels of" in again.output


def test_a_negative_image_is_not_repeated(tmp_path):
    assert negative(tmp_path, "one").exit_code == 0
    picture = tmp_path / "out" / "00-one-seed0-negative.png"
    result = runner.invoke(app, ["generate", "--like", str(picture), "--output", str(tmp_path / "again")])
    assert result.exit_code == 2
    assert "is the negative image of 'one', which `negengine negative` draws" in result.output


@pytest.mark.parametrize("model", models.DIGITS)
def test_nag_avoids_the_caption_and_can_be_repeated(tmp_path, model):
    nag = ("--nag", "--set", "nag.scale=3", "--negative-prompt", "thin", "--method", "cads")
    result = negative(tmp_path, "one", "two", "--count", 2, *nag, model=model)
    assert result.exit_code == 0, result.output
    picture = tmp_path / "out" / "01-two-seed1-00.png"
    told = png.read(picture)
    assert told["dnp"]["avoid_with"]["scale"] == 3
    cads, avoiding = told["run"]["methods"]
    assert (cads["method"], avoiding["method"], avoiding["negative_prompt"][1]) == ("cads", "nag", f"thin, {told['caption']}")
    assert not {"negative_prompt", "true_cfg_scale"} & told["run"]["call"].keys()
    again = runner.invoke(app, ["generate", "--like", str(picture), "--output", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    assert "01-two-seed1-00.png has exactly the pixels of" in again.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--nag", "--method", "nag"), "--nag is NAG away from the caption; drop --method nag"),
        (("--nag", "--set", "nag.negative_prompt=dull"), "give your own negative_prompt to the call"),
        (("--set", "nag.scale=3"), "nag is not chosen"),
    ],
)
def test_bad_input_beside_nag(tmp_path, arguments, message):
    result = negative(tmp_path, "one", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not list((tmp_path / "out").glob("0*.png"))


@pytest.mark.parametrize("nag, advice", [((), "Give --guidance above 1"), (("--nag",), "give --negative-guidance above 1")])
def test_a_model_that_guides_by_default_not_at_all(tmp_path, monkeypatch, nag, advice):
    """FLUX from the hub has no true CFG unless it is asked for; the flags that are advised are those of this command."""
    module = importlib.import_module("negengine.cli.negative")  # the package has the command under this name
    monkeypatch.setattr(module, "preset", lambda model, count: {"max_sequence_length": 16, "height": 32, "width": 32})
    result = negative(tmp_path, "one", *nag, model="mnist-flux")
    assert result.exit_code == 2
    assert advice in result.output
    if not nag:
        assert "--nag, --negative-guidance" in result.output


def test_a_pipeline_that_takes_no_negative_prompt(tmp_path, monkeypatch):
    """As FLUX.2 klein, which takes it encoded alone."""

    class Klein:
        def __call__(self, prompt, guidance_scale=4.0, negative_prompt_embeds=None): ...

    module = importlib.import_module("negengine.cli.negative")
    monkeypatch.setattr(module, "load", lambda *given: Klein())
    result = negative(tmp_path, "one")
    assert result.exit_code == 2
    assert "Klein takes no negative prompt as text" in " ".join(result.output.split())
