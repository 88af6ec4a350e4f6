"""The command line as a user types it, on the embedded models."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import negengine
from negengine import models, ops
from negengine.cli import app, demonstration
from negengine.cli.doctor import self_test
from negengine.cli.errors import one_line_errors
from negengine.models import presets
from negengine.ops import guidance_check, registry

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


def generate(tmp_path, *arguments, model="mnist-flux", prompt="a handwritten 3"):
    return run("generate", "--model", model, "--prompt", prompt, "--output", tmp_path / "out", "--steps", 2, *arguments)


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 30), "white").save(tmp_path / "picture.png")
    Image.new("L", (40, 30), 255).save(tmp_path / "mask.png")
    Image.new("L", (30, 30), 255).save(tmp_path / "wrong.png")
    Image.new("L", (40, 30), 0).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def test_version():
    assert run("--version").output.strip() == f"negengine {negengine.__version__}"


def test_help_names_what_the_papers_do():
    assert all(f"({name})" in run("--help").output for name in ("NegToMe", "DNG", "DNP"))


def test_doctor_tests_every_backend():
    result = run("doctor")
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    assert all(name in result.output for name in ops.backends())
    assert "FAILED" not in result.output
    for search in ("bf16", "int8"):
        usable = registry._BACKENDS["cpu"].missing() or registry._BACKENDS["cpu"].refuses(
            torch.device("cpu"), torch.float32, search
        )
        assert (f"│ {search} " in result.output) == (usable is None)


def test_doctor_fails_when_a_backend_is_wrong(monkeypatch):
    match = ops.match

    def wrong_rows(*args, **kwargs):
        cosine, index = match(*args, **kwargs)
        return cosine, index.flip(1)

    monkeypatch.setattr(ops, "match", wrong_rows)
    assert "below the best" in self_test("torch", "cpu", torch.float32, 0)
    assert run("doctor").exit_code == 1


def test_doctor_tests_the_operators_of_guidance(monkeypatch):
    asked = []

    def wrong(device, dtype, backend):
        asked.append(backend)
        return "nag is off"

    monkeypatch.setattr(guidance_check, "wrong", wrong)
    result = run("doctor")
    assert result.exit_code == 1
    assert "FAILED: nag is off" in result.output
    usable = {name for name, reason in ops.backends().items() if reason is None and registry._BACKENDS[name].guidance}
    assert set(asked) == usable


def test_demo_writes_picture_table_and_numbers(tmp_path):
    result = run("demo", "--model", "mnist-flux", "--groups", 2, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "Vendi score" in result.output
    numbers = json.loads((tmp_path / "demo.json").read_text())["models"]["mnist-flux"]["differ"]
    assert numbers["images"] == 8
    (report,) = numbers["reports"]["with NegToMe"]
    assert "merged" in report
    vendi = numbers["metrics"]["vendi:mnist-classifier"]
    assert vendi["mean"]["with NegToMe"] != vendi["mean"]["without"]
    assert vendi["difference"]["with NegToMe"]["mean"] == pytest.approx(vendi["mean"]["with NegToMe"] - vendi["mean"]["without"])
    page = Image.open(tmp_path / "demo.png")
    assert page.width > 8 * 64
    assert len(set(page.convert("L").tobytes())) > 20


@pytest.mark.parametrize("model", [name for name in models.NAMES if name.startswith("people-")])
def test_the_demo_of_people_keeps_away_from_a_picture_and_counts_looks(tmp_path, monkeypatch, model):
    monkeypatch.setitem(presets.PRESETS, model, dataclasses.replace(models.preset(model), steps=2))
    monkeypatch.setattr(demonstration, "CHARACTER_GROUPS", 1)
    result = run("demo", "--model", model, "--groups", 1, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "demo.json").read_text())["models"][model]
    looks = numbers["differ"]["metrics"]["distinct:people-look"]["mean"]
    assert 1 <= looks["without"] <= 4
    away = numbers["away"]
    assert away["variants"] == ["without", "away from the picture", "away from its head"]
    similar = away["metrics"]["asset-similarity:people-classifier"]["mean"]
    assert len(set(similar.values())) > 1
    assert away["methods"]["away from its head"][0]["reference"] == [{"image": "in memory", "mask": True, "noise": True}]
    assert "away from its head: NegToMe on" in result.output
    assert Image.open(tmp_path / "demo.png").width > 8 * 96


def told(file):
    return json.loads(Image.open(file).text["negengine"])


def method_of(run, name):
    return next(settings for settings in run["methods"] if settings["method"] == name)


@pytest.mark.parametrize("model", models.DIGITS)
def test_generate_writes_images_that_carry_their_settings(tmp_path, model):
    flags = ("--threshold", -1, "--timesteps", 0, 1000, "--set", "negtome.min_grid=8")
    result = generate(tmp_path, "--count", 2, "--seed", 7, *flags, model=model)
    assert result.exit_code == 0, result.output
    assert "merged 100.0% of the tokens" in result.output
    files = sorted((tmp_path / "out").iterdir())
    assert [f.name for f in files] == ["00-a-handwritten-3-seed7-00.png", "00-a-handwritten-3-seed7-01.png"]
    picture = told(files[1])
    assert (picture["prompt"], picture["index"], picture["seed"]) == ("a handwritten 3", 1, 7)
    run = picture["run"]
    call = {**models.preset(model).call_kwargs(), "num_inference_steps": 2}
    if "negative_prompt" in call:
        call["negative_prompt"] = ""
    assert run == {
        "model": model, "prompt": ["a handwritten 3"], "count": 2, "seed": 7, "dtype": "float32", "device": "cpu",
        "scheduler": None, "call": call, "methods": run["methods"],
    }  # fmt: skip
    settings = method_of(run, "negtome")
    assert (settings["threshold"], settings["timesteps"], settings["min_grid"], settings["seed"]) == (-1, [0, 1000], 8, 7)
    assert settings["alpha"] == models.negtome_preset(model).alpha
    assert settings["blocks"] is not None
    assert picture["reports"]["negtome"]["merged_tokens"] == picture["reports"]["negtome"]["eligible_tokens"] > 0
    assert picture["versions"]["torch"] == torch.__version__
    assert "threads" in picture["machine"]


def test_the_same_command_gives_the_same_images_and_negtome_changes_all_but_the_first(tmp_path):
    where = []
    always = ("--reference", "first", "--threshold", -1, "--timesteps", 0, 1000)
    for name, arguments in (("a", always), ("b", always), ("c", ("--method", "none"))):
        call = ("--model", "mnist-flux", "--prompt", "3", "--count", 2, "--steps", 2, "--output", tmp_path / name)
        result = run("generate", *call, *arguments)
        assert result.exit_code == 0, result.output
        where.append([Image.open(f).tobytes() for f in sorted((tmp_path / name).iterdir())])
    assert where[0] == where[1]
    assert where[0][0] == where[2][0]
    assert where[0][1] != where[2][1]


@pytest.mark.parametrize("model", models.DIGITS)
def test_generate_merges_by_the_preset_of_an_embedded_model(tmp_path, model):
    result = generate(tmp_path, "--count", 2, model=model)
    assert result.exit_code == 0, result.output
    assert "it changed nothing" not in result.output
    run = told(next((tmp_path / "out").iterdir()))["run"]
    assert method_of(run, "negtome")["reference"] == models.negtome_preset(model).reference


def test_generate_never_overwrites(tmp_path):
    assert generate(tmp_path, "--count", 1).exit_code == 0
    result = generate(tmp_path, "--count", 1)
    assert result.exit_code == 2
    assert "exists" in result.output


def test_a_reference_picture_with_its_mask(tmp_path, picture):
    arguments = ("--reference", picture / "picture.png", "--mask", picture / "mask.png", "--threshold", -1, "--timesteps", 0, 1000)
    result = generate(tmp_path, "--count", 1, *arguments)
    assert result.exit_code == 0, result.output
    assert "merged 100.0%" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--alpha", "nan"), "alpha must be finite"),
        (("--threshold", "2"), "threshold is compared with a cosine"),
        (("--timesteps", "900", "100"), "is empty"),
        (("--reference", "frist"), "is neither first, others, previous nor a file"),
        (("--reference", "first", "--mask", "{}/mask.png"), "stands alone"),
        (("--reference", "{}/picture.png", "--mask", "{}/wrong.png"), "make them equal"),
        (("--reference", "{}/picture.png", "--mask", "{}/black.png"), "black everywhere"),
        (("--reference", "{}/text.png"), "cannot identify image file"),
        (("--set", "negtome.matching=publish"), "negtome: matching must be one of"),
        (("--set", "negtome.matching=release", "--reference", "others"), "one reference image only"),
        (("--dtype", "float8"), "--dtype must be one of"),
        (("--set", "negtome.group_size=3"), "does not divide"),
        (("--guidance", "2"), "--guidance does nothing; use --true-cfg"),
        (("--set", "negtome.backend=cuda"), "unknown backend"),
        (("--set", "negtome.blocks=up_blocks"), "no attention block"),
        (("--device", "nope"), "--device nope cannot be used"),
        (("--true-cfg", "nan"), "--true-cfg must be finite"),
        (("--negative-prompt", "4", "--true-cfg", "inf"), "--true-cfg must be finite"),
        (("--method", "none", "--alpha", "2"), "--alpha sets NegToMe, which is not chosen; add --method negtome"),
        (
            ("--method", "guidance-interval", "--set", "guidance-interval.low=0", "--set", "guidance-interval.high=9"),
            "needs classifier-free guidance",
        ),
        (("--method", "dng", "--avoid", "4"), "give --set dng.surrogate=ancestral to"),
        (("--method", "dng", "--avoid", "4"), "give --true-cfg 1 --set dng.cfg=3"),
        (("--method", "nag", "--avoid", "4"), "NAG cannot act beside true CFG (scale 3)"),
        (("--scheduler", "Euler"), "--scheduler Euler is no sampler of diffusers; there are FlowMatchEulerDiscreteScheduler"),
        (("--scheduler", "DDPMScheduler"), "--scheduler DDPMScheduler does not take the predictions of this model; there are Flow"),
        (("--method", "sld"), "give --method sld:dng; and SLD cannot act beside true CFG"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, picture, arguments, message):
    result = generate(tmp_path, *(a.format(picture) for a in arguments))
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheduler", ["Euler", "DiffusionPipeline", "FlowMatchEulerDiscreteScheduler"])
def test_what_is_no_sampler_of_a_model_is_answered_with_names(tmp_path, scheduler):
    result = generate(tmp_path, "--scheduler", scheduler, model="mnist-sdxl")
    assert result.exit_code == 2
    assert result.output.startswith(f"error: --scheduler {scheduler} ")
    assert "; there are DDIMScheduler, DDPMScheduler, " in result.output


def test_a_sampler_without_a_density_is_answered_with_both_ways(tmp_path):
    result = generate(tmp_path, "--method", "dng", "--avoid", "4", model="mnist-sdxl")
    assert result.exit_code == 2
    assert "give --scheduler EulerAncestralDiscreteScheduler, or --set dng.surrogate=ancestral to" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is that of a machine without a GPU")
def test_a_missing_gpu_is_one_line(tmp_path):
    result = generate(tmp_path, "--device", "cuda")
    assert result.exit_code == 2
    assert "--device cuda cannot be used" in result.output


def test_devices_are_checked_before_the_model(tmp_path):
    result = generate(tmp_path, "--device", "nope", model="no such model")
    assert "--device nope cannot be used" in result.output


def test_an_error_of_many_lines_is_told_in_one(capsys):
    @one_line_errors
    def fail():
        raise OSError("first\n  second\n\nthird")

    with pytest.raises(typer.Exit) as stopped:
        fail()
    assert stopped.value.exit_code == 2
    assert capsys.readouterr().err == "error: first second third\n"


def test_flags_that_cannot_be_read_are_one_line_too(tmp_path):
    for arguments, message in (
        (("--count", 0), "Invalid value for '--count': "),
        (("--steps", "many"), "Invalid value for '--steps': "),
        (("--nope",), "No such option"),
    ):
        result = generate(tmp_path, *arguments)
        assert result.exit_code == 2
        assert result.output.startswith(f"error: {message}"), result.output
        assert result.output.count("\n") == 1
    assert run("nope").output.startswith("error: No such command")
    assert "Usage" in run().output


def test_a_model_that_the_hub_does_not_give_is_told_with_the_cause(tmp_path, monkeypatch):
    def fetch(*args, **kwargs):
        try:
            raise ConnectionError("Cannot reach the hub.\nMore of it")
        except ConnectionError as error:
            raise OSError("check out the root cause in the stacktrace above") from error

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", fetch)
    result = generate(tmp_path, model="nobody/nothing")
    assert result.exit_code == 2
    told = "cannot be fetched from the hub under that name: Cannot reach the hub; check the name, the network"
    assert result.output.startswith("error: --model nobody/nothing is no folder, and " + told)
    assert "stacktrace" not in result.output


def test_one_image_is_counted_as_one(tmp_path):
    result = generate(tmp_path, "--count", 1, "--method", "none")
    assert f"1 image in {tmp_path / 'out'}" in result.output


TWO = ("--prompt", "a handwritten 5", "--count", 1)


@pytest.mark.parametrize("texts", [["4"], ["4", "9"]])
def test_texts_to_avoid_are_one_for_all_prompts_or_one_for_each(tmp_path, texts):
    avoid = [part for text in texts for part in ("--avoid", text)] + ["--method", "nag"]
    negative = [part for text in texts for part in ("--negative-prompt", text)]
    for name, flags in (("avoid", avoid), ("negative", negative)):
        result = generate(tmp_path / name, *TWO, *flags, "--seed", 3, model="mnist-sdxl")
        assert result.exit_code == 0, result.output
        told_run = told(sorted((tmp_path / name / "out").iterdir())[0])["run"]
        found = told_run["call"]["negative_prompt"] if name == "negative" else told_run["methods"][0]["negative_prompt"]
        assert found == (texts if len(texts) > 1 else texts[0])


@pytest.mark.parametrize("flags", [("--method", "nag", *("--avoid", "4") * 3), ("--negative-prompt", "4") * 3])
def test_texts_to_avoid_of_another_number_than_prompts(tmp_path, flags):
    result = generate(tmp_path, *TWO, *flags, model="mnist-sdxl")
    assert result.exit_code == 2
    assert result.output.startswith("error: 3 ")
    assert "for 2 prompts; give one, or one for each" in result.output


def test_an_unknown_model_is_one_line(tmp_path):
    result = generate(tmp_path, model="no such model")
    assert result.exit_code == 2
    assert "is no folder, no hub id" in result.output


def test_the_package_runs_as_a_module_and_loads_diffusers_for_pipelines_only():
    command = [sys.executable, "-X", "importtime", "-m", "negengine", "methods"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "negtome" in done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "torch" in loaded
    assert not loaded & {"diffusers", "transformers", "peft"}
