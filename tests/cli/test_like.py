"""Runs from files and pictures: what is repeated is the same to the last pixel."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from negengine import png
from negengine.cli import app, runs

AVOID = (
    "--method",
    "negtome",
    "--method",
    "dng",
    "--avoid",
    "a handwritten three",
    "--set",
    "dng.surrogate=ancestral",
    "--set",
    "dng.tau=0.02",
)
GUIDED = {"mnist-sdxl": (), "mnist-flux": ("--true-cfg", 1, "--set", "dng.cfg=3")}


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def drawn(folder, *arguments):
    result = run("generate", "--output", folder, *arguments)
    assert result.exit_code == 0, result.output
    return sorted(folder.glob("*.png")), result.output


def pixels(files):
    return [Image.open(file).tobytes() for file in files]


def edited(picture, path, **changes):
    """The same pixels, told otherwise."""
    png.write(Image.open(picture), path, {**png.read(picture), **changes})
    return path


@pytest.fixture(scope="module", params=["mnist-flux", pytest.param("mnist-sdxl", marks=pytest.mark.exhaustive)])
def pictures(request, tmp_path_factory):
    """Two prompts of two images each, with NegToMe and DNG."""
    call = ("--prompt", "a handwritten digit", "--prompt", "a bold digit", "--count", 2, "--seed", 5, "--steps", 4)
    folder = tmp_path_factory.mktemp(request.param)
    return drawn(folder, "--model", request.param, *call, *AVOID, *GUIDED[request.param])[0]


def test_a_picture_repeats_its_whole_call(pictures, tmp_path):
    for number, picture in ((3, pictures[3]), (0, pictures[0])):
        again, output = drawn(tmp_path / str(number), "--like", picture)
        assert [file.name for file in again] == [file.name for file in pictures]
        assert pixels(again) == pixels(pictures)
        assert f"{again[number]} has exactly the pixels of {picture}" in output
        assert "warning" not in output
        assert [png.read(file)["run"] for file in again] == [png.read(file)["run"] for file in pictures]


def test_a_picture_carries_the_posterior_of_its_own(pictures):
    posteriors = [png.read(picture)["reports"]["dng"]["p"] for picture in pictures]
    assert [len(p) for p in posteriors] == [5] * 4
    assert len({p[0] for p in posteriors}) == 1
    assert len({p[2] for p in posteriors}) == 4


def test_other_flags_change_a_repetition(pictures, tmp_path):
    files, output = drawn(tmp_path / "out", "--like", pictures[3], "--set", "dng.scale=0", "--seed", 6)
    before, after = (png.read(file)["run"] for file in (pictures[3], files[3]))
    assert f"{files[3]} stands for {pictures[3]}; changed: seed, methods" in output
    negtome, dng = after["methods"]
    assert negtome == before["methods"][0] | {"seed": 6}
    assert dng == before["methods"][1] | {"scale": 0.0}
    assert after["call"] == before["call"]
    _, output = drawn(tmp_path / "fewer", "--like", pictures[3], "--prompt", "one", "--count", 1, "--method", "none")
    assert f"no file stands for {pictures[3]}, which was image 3 of its call; changed: prompt, count, methods" in output


def test_a_file_and_flags_draw_the_same(pictures, tmp_path):
    whole = png.read(pictures[0])["run"]
    (tmp_path / "run.json").write_text(json.dumps(whole))
    assert pixels(drawn(tmp_path / "whole", "--settings", tmp_path / "run.json")[0]) == pixels(pictures)
    part = {"count": 2, "seed": 5, "call": {"num_inference_steps": 4}, "methods": whole["methods"]}
    part["call"] |= {"true_cfg_scale": 1} if whole["model"] == "mnist-flux" else {}
    (tmp_path / "part.yaml").write_text(json.dumps(part))
    flags = ("--model", whole["model"], "--prompt", "a handwritten digit", "--prompt", "a bold digit")
    assert pixels(drawn(tmp_path / "part", "--settings", tmp_path / "part.yaml", *flags)[0]) == pixels(pictures)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    call = ("--model", "mnist-sdxl", "--prompt", "one", "--count", 1, "--steps", 1, "--method", "none")
    return drawn(tmp_path_factory.mktemp("one"), *call)[0][0]


def test_other_versions_are_named(picture, tmp_path):
    told = png.read(picture)
    changes = {"versions": told["versions"] | {"torch": "1.0", "xformers": None}, "machine": told["machine"] | {"threads": 77}}
    other = edited(picture, tmp_path / "other.png", **changes)
    _, output = drawn(tmp_path / "out", "--like", other)
    assert f"was made with threads 77 (here {told['machine']['threads']}), torch 1.0 (here {told['versions']['torch']})" in output
    assert "python" not in output


def test_what_a_model_is_meant_to_have_today_is_not_asked(picture, tmp_path):
    told = png.read(picture)["run"]
    call = {name: value for name, value in told["call"].items() if name != "height"}
    bare = edited(picture, tmp_path / "bare.png", run=told | {"call": call})
    assert png.read(drawn(tmp_path / "out", "--like", bare)[0][0])["run"]["call"] == call


def test_the_sampler_is_chosen_and_repeated(tmp_path):
    sampler = "EulerAncestralDiscreteScheduler"
    call = ("--model", "mnist-sdxl", "--prompt", "one", "--count", 1, "--steps", 4)
    avoid = ("--method", "dng", "--avoid", "a handwritten three")
    files, _ = drawn(tmp_path / "a", *call, *avoid, "--scheduler", sampler)
    run = png.read(files[0])["run"]
    assert (run["scheduler"], run["methods"][0]["surrogate"]) == (sampler, None)
    again, output = drawn(tmp_path / "b", "--like", files[0])
    assert f"{again[0]} has exactly the pixels of {files[0]}" in output
    (tmp_path / "run.json").write_text(json.dumps({"scheduler": sampler, "methods": run["methods"]}))
    assert pixels(drawn(tmp_path / "c", *call, "--settings", tmp_path / "run.json")[0]) == pixels(files)
    other, output = drawn(tmp_path / "d", "--like", files[0], "--scheduler", "DDPMScheduler")
    assert f"{other[0]} stands for {files[0]}; changed: scheduler" in output
    assert pixels(other) != pixels(files)


def test_pictures_from_before_there_was_a_sampler_to_choose(picture, tmp_path):
    run = {name: value for name, value in png.read(picture)["run"].items() if name != "scheduler"}
    old = edited(picture, tmp_path / "old.png", run=run)
    assert "has exactly the pixels of" in drawn(tmp_path / "out", "--like", old)[1]


def test_other_pixels_fail(picture, tmp_path):
    image = Image.open(picture)
    image.putpixel((3, 3), tuple((value + 9) % 256 for value in image.getpixel((3, 3))))
    png.write(image, tmp_path / "changed.png", png.read(picture))
    result = run("generate", "--like", tmp_path / "changed.png", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "but its pixels differ (at most 9 of 255)" in result.output


def test_pictures_that_cannot_be_repeated(picture, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    run_of = png.read(picture)["run"]
    part = edited(picture, tmp_path / "part.png", run={"model": "mnist-sdxl"})
    odd = edited(picture, tmp_path / "odd.png", run=run_of | {"cfg": 3})
    seeds = edited(picture, tmp_path / "seeds.png", run=run_of | {"seed": [1, 2, 3]})
    call = edited(picture, tmp_path / "call.png", run=run_of | {"call": {"true_cfg_scale": 2}})
    for file, message in (
        (tmp_path / "plain.png", "does not tell how it was made"),
        (tmp_path / "none.png", f"error: {tmp_path / 'none.png'}: No such file or directory"),
        (part, "does not carry the whole run"),
        (odd, "odd.png has 'cfg'; a run has model, prompt"),
        (seeds, "3 seeds for 1 images"),
        (call, "StableDiffusionXLPipeline, takes no true_cfg_scale"),
    ):
        result = run("generate", "--like", file, "--output", tmp_path / "out")
        assert result.exit_code == 2
        assert message in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"modle": "x"}, "has 'modle'; a run has model, prompt, count"),
        ({"scheduler": 3}, "scheduler must be the name of a class, or null for the pipeline's own, got 3"),
        ({"count": 0}, "count must be a whole number from 1 on, got 0"),
        ({"seed": []}, "seed must be a whole number from 0 on, or one for each image"),
        ({"prompt": []}, "prompt must be a text or a list of texts"),
        ({"call": {"generator": 3}}, "call has generator: give `seed`"),
        ({"call": {"negative_prompt": ["a", "b"]}}, "2 negative prompts for 1 prompt"),
        ({"methods": {"method": "cads"}}, "methods must be a list of mappings"),
        ({"methods": [{"method": "dnp"}]}, "`negengine negative` does that"),
        ({"methods": [{"method": "cads", "tau1": 1}]}, "cads: tau1 must be below tau2"),
    ],
)
def test_bad_files_are_one_error(settings, message, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(settings))
    flags = () if "prompt" in settings else ("--prompt", "one")
    result = run("generate", "--model", "mnist-sdxl", *flags, "--settings", tmp_path / "run.json", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_a_run_needs_a_model_and_a_prompt(tmp_path, picture):
    assert "give --model and --prompt, or a file that tells" in run("generate").output
    (tmp_path / "run.yaml").write_text("model: mnist-sdxl\n")
    assert "give --prompt, or" in run("generate", "--settings", tmp_path / "run.yaml").output
    assert "both tell a whole run" in run("generate", "--settings", tmp_path / "run.yaml", "--like", picture).output


def test_a_file_needs_no_list_for_one_prompt(tmp_path):
    (tmp_path / "run.yaml").write_text("prompt: one\nmethods: []\n")
    assert runs.read_file(tmp_path / "run.yaml") == {"prompt": ["one"], "methods": []}
