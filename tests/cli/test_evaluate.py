"""``negengine evaluate`` as a user types it: on an embedded model, on folders, and with what cannot work."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from negengine import png
from negengine.cli import app
from negengine.cli.evaluate.judging import expected_of
from negengine.evaluate import results
from negengine.evaluate.asked import asked_for
from negengine.evaluate.groups import Drawn

runner = CliRunner()
QUICK = ("--call", "num_inference_steps=2", "--no-plot")


def evaluate(*arguments):
    return runner.invoke(app, ["evaluate", *(str(argument) for argument in arguments)], env={"COLUMNS": "160"})


def refused(*arguments):
    result = evaluate(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    return line


def means(folder):
    return {(row["variant"], row["metric"]): row["mean"] for row in results.read(folder / "evaluate.json")["rows"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small evaluation of a running pipeline: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    model = ("--model", "mnist-sdxl", "--protocol", "diversity", "--prompt", "a handwritten two", "--prompt", "seven")
    result = evaluate(*model, "--images", 3, "--seed", 0, "--seed", 4, "--output", folder, "--call", "num_inference_steps=2")
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_a_running_pipeline_leaves_results_a_page_a_plot_and_its_pictures(run):
    folder, output = run
    told = results.read(folder / "evaluate.json")
    assert told["settings"]["model"] == "mnist-sdxl"
    assert {name: (about["images"], about["seeds"]) for name, about in told["variants"].items()} == {
        "without": (12, [0, 4]),
        "negtome": (12, [0, 4]),
    }
    assert told["variants"]["negtome"]["methods"][0]["method"] == "negtome"
    assert "NegToMe on SDXL: active in" in told["variants"]["negtome"]["reports"][0]
    assert set(told["metrics"]) == {f"{name}:mnist-classifier" for name in ("distance", "vendi", "as-prompted")}
    assert len(list((folder / "images").rglob("*.png"))) == 24
    assert Image.open(folder / "evaluate.png").width > 500
    assert "| Vendi score (mnist-classifier) ↑ |" in (folder / "evaluate.md").read_text()
    assert "Differences from without" in output
    assert "0.743" in output  # the paper's


def test_the_pictures_that_it_leaves_give_the_same_numbers(run, tmp_path):
    folder, _ = run
    images = folder / "images"
    result = evaluate(
        images / "without", images / "negtome", "--output", tmp_path, "--no-plot", "--metric", "vendi", "--metric", "as-prompted"
    )
    assert result.exit_code == 0, result.output
    found, expected = means(tmp_path), means(folder)
    assert len(found) == 4
    assert found == pytest.approx({key: expected[key] for key in found})
    assert all(row["difference"]["paired"] for row in results.read(tmp_path / "evaluate.json")["rows"] if row["difference"])


def test_variants_differ_where_a_method_acts_and_nowhere_else(run):
    def pictures(name):
        return [np.asarray(Image.open(file), dtype=int) for file in sorted((run[0] / "images" / name).glob("*.png"))]

    assert any((a != b).any() for a, b in zip(pictures("without"), pictures("negtome"), strict=True))


@pytest.mark.exhaustive
def test_a_picture_can_be_drawn_again(run, tmp_path):
    file = sorted((run[0] / "images" / "negtome").glob("*.png"))[1]
    again = runner.invoke(app, ["generate", "--like", str(file), "--output", str(tmp_path)])
    assert "warning" not in again.output
    with Image.open(file) as before, Image.open(sorted(tmp_path.glob("*.png"))[1]) as after:
        difference = np.abs(np.asarray(before, dtype=int) - np.asarray(after, dtype=int)).max()
    assert difference <= 2  # five groups in a batch round otherwise than one


def test_labels_of_a_file_and_features_of_ones_own(run, tmp_path):
    images = run[0] / "images" / "without"
    labels = tmp_path / "labels.csv"
    names = sorted(file.name for file in images.glob("*.png"))
    labels.write_text("file,label\n" + "".join(f"{name},{'ab'[number % 2]}\n" for number, name in enumerate(names)))
    result = evaluate(
        images, "--labels", labels, "--metric", "entropy", "--metric", "vendi:pixels", "--output", tmp_path, "--no-plot"
    )
    assert result.exit_code == 0, result.output
    found = means(tmp_path)
    assert found["without", "entropy:file"] == pytest.approx(1)
    assert 1 < found["without", "vendi:pixels"] < 3


EVERY = (
    ("without", (), ()),
    ("negtome", (), ()),
    ("cads", (), ("--call", "cads.true_cfg_scale=1")),
    ("seed-variance", (), ("--call", "seed-variance.true_cfg_scale=1")),
    ("nag", ("--avoid", "three"), ("--call", "nag.true_cfg_scale=1")),
    ("negative-prompting", (), ("--call", "negative-prompting.true_cfg_scale=1", "--set", "negative-prompting.cfg=3")),
    ("rewriting", (), ()),
    ("rewriting+negtome", (), ()),
)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", ["mnist-flux", "mnist-sdxl"])
def test_every_rival_by_its_name(tmp_path, model):
    lines = tmp_path / "lines.txt"
    lines.write_text("a thin {prompt}\na bold {prompt}\n")
    flux = model == "mnist-flux"
    variants = [argument for name, *_ in EVERY for argument in ("--variant", name)]
    more = [argument for _, both, own in EVERY for argument in (*both, *(own if flux else ()))]
    if flux:
        more += ["--variant", "dng", "--call", "dng.true_cfg_scale=1", "--set", "dng.cfg=3", "--set", "dng.surrogate=ancestral"]
        more += ["--variant", "sld:dng", "--call", "sld:dng.true_cfg_scale=1"]
    else:
        more += ["--variant", "dng", "--set", "dng.surrogate=ancestral", "--variant", "sld", "--variant", "guidance-interval"]
        more += ["--set", "guidance-interval.low=0.2", "--set", "guidance-interval.high=9", "--set", "sld.warmup=0"]
    command = ("--model", model, "--protocol", "diversity", "--prompt", "digit two", "--images", 2, "--seed", 0)
    result = evaluate(*command, *variants, *more, "--rewrite", lines, "--output", tmp_path / "out", *QUICK)
    assert result.exit_code == 0, result.output
    told = results.read(tmp_path / "out" / "evaluate.json")
    assert len(told["variants"]) == len(EVERY) + (2 if flux else 3)
    drawn = {
        name: [Image.open(file).tobytes() for file in sorted((tmp_path / "out" / "images" / name.replace(":", "-")).glob("*.png"))]
        for name in told["variants"]
    }
    same = [name for name in drawn if name != "without" and drawn[name] == drawn["without"]]
    assert not same


@pytest.mark.exhaustive
def test_the_asset_protocol(tmp_path):
    Image.effect_noise((32, 32), 80).convert("RGB").save(tmp_path / "asset.png")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 32, 16))
    mask.save(tmp_path / "mask.png")
    asset = ("--protocol", "asset", "--asset", tmp_path / "asset.png", "--mask", tmp_path / "mask.png", "--seed", 0)
    result = evaluate("--model", "mnist-sdxl", *asset, "--output", tmp_path / "out", *QUICK)
    assert result.exit_code == 0, result.output
    told = results.read(tmp_path / "out" / "evaluate.json")
    assert list(told["variants"]) == ["without", "asset", "asset-masked"]
    references = [told["variants"][name]["methods"][0]["reference"][0] for name in ("asset", "asset-masked")]
    assert [bool(reference["mask"]) for reference in references] == [False, True]
    assert "-34.57 %" in result.output


@pytest.mark.exhaustive
def test_the_removal_protocol(tmp_path):
    removal = ("--protocol", "removal", "--forbidden", "three", "--images", 4, "--repeats", 2, "--seed", 0, "--seed", 1)
    few = ("--metric", "forbidden", "--metric", "kl", "--variant", "without", "--variant", "negative-prompting")
    result = evaluate("--model", "mnist-sdxl", *removal, *few, "--output", tmp_path, *QUICK)
    assert result.exit_code == 0, result.output
    told = results.read(tmp_path / "evaluate.json")
    assert told["settings"]["of the protocol"]["prompts"] == ["a digit"]
    assert told["variants"]["negative-prompting"]["methods"][0]["prompt"] == "a handwritten three"
    assert told["variants"]["without"]["images"] == 16


AWAY = (
    "--variant", "without", "--variant", "negative-prompting", "--call", "negative-prompting.true_cfg_scale=1",
    "--set", "negative-prompting.cfg=3",
)  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("arguments", "metrics"),
    [
        (("diversity", "--prompt", "a cook"), {"distinct:people-look", "label-entropy:people-tone", "vendi"}),
        (("removal", "--forbidden", "noto", "--repeats", 2, *AWAY), {"forbidden:people-style", "kl:people-style", "as-prompted"}),
        (("removal", "--forbidden", "judge", "--repeats", 2, *AWAY, "--metric", "forbidden"), {"forbidden"}),
        (("pairs",), {"prompt-probability:people-everything", "reference-distance"}),
    ],
)
def test_the_world_of_people(tmp_path, arguments, metrics):
    result = evaluate(
        "--model", "people-flux", "--protocol", *arguments, "--images", 2, "--seed", 0, "--output", tmp_path / "out", *QUICK
    )
    assert result.exit_code == 0, result.output
    told = results.read(tmp_path / "out" / "evaluate.json")
    found = {key.removesuffix(":people-classifier") for key in told["metrics"]}
    assert metrics <= found


@pytest.mark.exhaustive
def test_the_protocol_of_pairs(tmp_path):
    pairs = ("--protocol", "pairs", "--prompt", "a handwritten two", "--images", 2, "--seed", 0)
    result = evaluate("--model", "mnist-flux", *pairs, "--output", tmp_path, *QUICK)
    assert result.exit_code == 0, result.output
    told = results.read(tmp_path / "evaluate.json")
    assert [table["opponent"] for table in told["pairs"]] == ["random", "standard"]
    for table in told["pairs"]:
        for what in ("correctness", "quality"):
            assert sum(choice[what]["mean"] for choice in table["choices"]) == pytest.approx(1)
    assert "DNP against without and standard" in result.output
    assert "40.57 %" in result.output


def test_the_list_tells_what_there_is():
    result = evaluate("--list")
    assert result.exit_code == 0
    for name in ("inception-score", "extractor dinov2", "extractor mnist-classifier", "protocol removal"):
        assert name in result.output


@pytest.fixture
def folders(tmp_path):
    for name, size in (("one", (4, 4)), ("other", (5, 5)), ("cat/one", (4, 4))):
        for number in range(4):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            Image.effect_noise(size, 40 + number).convert("RGB").save(tmp_path / name / f"cat-{number}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no picture")
    (tmp_path / "labels.csv").write_text("name,label\ncat,a\nelk,b\n")
    for name, size in (("mixed/a", (5, 5)), ("mixed/b", (4, 4)), ("few/a", (4, 4)), ("few/b", (4, 4))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    (tmp_path / "shared.csv").write_text("name,label\ncat,a\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "nothing is no folder"),
        (("empty",), "there is no image in"),
        (("broken",), "cannot be read as an image"),
        (("one", "other"), "the images are of unequal size: cat-0.png (one)"),
        (("one", "one"), "a folder is given twice"),
        (("one", "--base", "two"), "--base two is none of the folders; there are one"),
        (("one", "--metric", "fidd"), "there is no metric 'fidd'; there are distance, vendi"),
        (("one", "--features", "eyes"), "there is no feature extractor 'eyes'; there are pixels, dreamsim"),
        (("one", "--labels", "labels.csv", "--metric", "entropy"), "has a label for elk, which is neither an image nor a group"),
        (("one", "cat/one", "--labels", "shared.csv", "--metric", "entropy"), "which one and cat/one hold; write one/cat"),
        (("one", "--labels", "labels.csv", "--metric", "vendi:pixels"), "--labels: none of the metrics uses it; they are vendi"),
        (("one", "--labels", "clip", "--metric", "vendi:pixels"), "--labels: none of the metrics uses it"),
        (("one", "--features", "dinov2", "--metric", "vendi:pixels"), "--features: none of the metrics uses it"),
        (("one", "--class", "cat", "--metric", "vendi:pixels"), "--class: none of the metrics uses it"),
        (("one", "--against", "one", "--metric", "vendi:pixels"), "--against: none of the metrics uses it"),
        (("one", "--forbidden", "cat", "--metric", "vendi:pixels"), "--forbidden: none of the metrics uses it"),
        (("one", "--asset", "one/cat-0.png", "--metric", "vendi:pixels"), "--asset: none of the metrics uses it"),
        (("one", "--prompts-of", "labels.csv", "--metric", "vendi:pixels"), "--prompts-of: none of the metrics looks at prompts"),
        (("one", "--against", "other", "--metric", "kid:pixels"), "--against: its images have 5 x 5 pixels, and those that are"),
        (("one", "--against", ".", "--metric", "kid:pixels"), "--against: broken/a.png cannot be read"),
        (("one", "--against", "mixed", "--metric", "kid:pixels"), "--against: mixed/a.png has 5 x 5 pixels and mixed/b.png 4 x 4"),
        (("one", "--against", "few", "--metric", "reference-distance:pixels"), "needs 3 reference images or more (--against)"),
        (("one", "--asset", "broken/a.png", "--metric", "asset-correlation"), "--asset: broken/a.png cannot be read"),
        (("one", "--metric", "reference-distance:pixels"), "needs reference images: give --against FOLDER"),
        (("one", "--metric", "asset-correlation"), "needs the asset to keep away from: give --asset FILE"),
        (("one", "--metric", "as-prompted:mnist-classifier"), "needs the class that is asked for"),
        (("one", "--metric", "entropy:pixels"), "entropy needs an extractor that reads classes, and pixels reads none"),
        (("one", "--per-group", "9"), "the group cat has 4 images, fewer than --per-group 9"),
        (("one", "--variant", "negtome", "--seed", "1"), "--seed and --variant are for --model and --protocol"),
        (("one", "--device", "moon"), "--device moon cannot be used"),
    ],
)
def test_folders_that_cannot_be_judged(folders, monkeypatch, arguments, message):
    monkeypatch.chdir(folders)
    usual = () if {"--metric", "--features"} & set(arguments) else ("--features", "pixels")
    assert message in refused(*arguments, *usual, "--no-plot")


MODEL = ("--model", "mnist-sdxl", "--protocol")
JUDGED = (
    "--variant", "without", "--variant", "dnp", "--metric", "as-prompted:mnist-classifier",
    "--metric", "prompt-probability:mnist-classifier",
)  # fmt: skip
ABSENT = (
    "--prompt", "a digit", "--forbidden", "three", "--variant", "without", "--variant", "negtome",
    "--metric", "forbidden:mnist-classifier",
)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give folders of images, or --model and --protocol"),
        (("--per-group", "3"), "--per-group is for folders of images, and there are none"),
        ((*MODEL, "diverse"), "there is no protocol 'diverse'; there are diversity, asset, removal, pairs"),
        ((*MODEL, "diversity", "--metric", "fidd"), "there is no metric 'fidd'"),
        ((*MODEL, "diversity", "--variant", "negtomi"), "there is no variant 'negtomi'; there are without, negtome"),
        ((*MODEL, "diversity", "--variant", "without", "--variant", "without"), "'without' twice among its variants"),
        ((*MODEL, "diversity", "--variant", "without+negtome"), "without stands alone"),
        ((*MODEL, "diversity", "--variant", "asset"), "NegToMe away from --asset"),
        ((*MODEL, "diversity", "--variant", "rewriting"), "needs --rewrite FILE"),
        ((*MODEL, "diversity", "--variant", "dng"), "dng needs prompt: give --avoid TEXT"),
        ((*MODEL, "diversity", "--avoid", "three"), "--avoid is for variants that avoid a prompt"),
        ((*MODEL, "diversity", "--set", "cads.scale=1"), "no variant uses cads; the variants are without, negtome"),
        ((*MODEL, "diversity", "--call", "steps"), "write [VARIANT.]KEY=VALUE"),
        ((*MODEL, "diversity", "--call", "cads.x=1"), "the variants are without, negtome"),
        ((*MODEL, "diversity", "--call", "stepps=3"), "StableDiffusionXLPipeline, takes no stepps"),
        ((*MODEL, "diversity", "--rewrite", "lines.txt"), "--rewrite is for the variant rewriting, which is not there"),
        ((*MODEL, "diversity", "--negatives", "mine=lines.txt"), "--negatives mine is for the variant mine, which is not there"),
        ((*MODEL, "diversity", "--against", ".", "--metric", "vendi"), "--against: none of the metrics uses it; they are vendi"),
        ((*MODEL, "diversity", "--class", "cat"), "--class: none of the metrics uses it"),
        (
            (*MODEL, "asset", "--asset", "a.jpg", "--mask", "a.jpg", "--variant", "without", "--variant", "asset"),
            "--mask is for the variant asset-masked, which is not there; there are without, asset",
        ),
        ((*MODEL, "asset", "--asset", "a.jpg", "--mask", "lines.txt"), "--mask: lines.txt cannot be read as an image"),
        ((*MODEL, "asset", "--asset", "lines.txt", "--prompt", "digit"), "--asset: lines.txt cannot be read as an image"),
        ((*MODEL, "diversity", "--forbidden", "three"), "--forbidden is for the protocol removal, not for diversity"),
        ((*MODEL, "diversity", "--labels", "a.csv"), "--labels a.csv: a file is for folders"),
        ((*MODEL, "diversity", "--base", "x"), "--base is for folders"),
        ((*MODEL, "diversity", "--prompts", "latin.txt"), "latin.txt is not in UTF-8"),
        ((*MODEL, "diversity", "--prompt", "a digit"), "as-prompted needs the class that is asked for"),
        ((*MODEL, "diversity", "--negatives", "x"), "write NAME=FILE"),
        ((*MODEL, "asset"), "the protocol asset needs --asset"),
        ((*MODEL, "asset", "--asset", "nothing.png"), "nothing.png"),
        ((*MODEL, "removal"), "the protocol removal needs --forbidden"),
        ((*MODEL, "removal", "--forbidden", "ten", "--metric", "kl"), "there is no class 'ten'; there are zero, one"),
        ((*MODEL, "pairs", "--variant", "without", "--variant", "random"), "compares dnp with at least one other"),
        (
            ("--model", "mnist-flux", "--protocol", "diversity", "--variant", "without", "--variant", "cads"),
            "the variant cads: CADS cannot act beside true CFG (scale 3), which calls the denoiser twice; "
            "give --call cads.true_cfg_scale=1",
        ),
        (
            ("--model", "mnist-flux", "--protocol", "removal", "--forbidden", "three", "--metric", "kl"),
            "the variant dng: FlowMatchEulerDiscreteScheduler has no transition density; give --set dng.surrogate=ancestral",
        ),
        (
            ("--model", "mnist-flux", "--protocol", "removal", "--forbidden", "three", "--metric", "kl"),
            "calls the denoiser twice; give --call dng.true_cfg_scale=1 --set dng.cfg=3",
        ),
        (
            ("--model", "people-flux", "--protocol", "removal", "--forbidden", "sailor"),
            "there is no class 'sailor'; there are artist, astronaut",
        ),
        # the protocol's own prompt to avoid asks for no variant that uses it: nothing but the model is missing
        (("--model", "nowhere", "--protocol", "removal", *ABSENT), "--model nowhere is no folder"),
        ((*MODEL, "pairs", "--metric", "prompt-probability"), "takes two, the first for correctness and the second for quality"),
        ((*MODEL, "pairs", *JUDGED, "--call", "stepps=3"), "takes no stepps"),  # all but this argument fits
        (("--model", "nowhere", "--protocol", "diversity", "--metric", "vendi:pixels"), "--model nowhere is no folder"),
        (("--model", "a/b", "--protocol", "removal", "--forbidden", "cat"), "needs --prompt or --prompts"),
    ],
)
def test_pipelines_that_cannot_be_evaluated(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "lines.txt").write_text("an old {prompt}")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    assert message in refused(*arguments, "--no-plot")
    assert not list(tmp_path.rglob("*.png"))


def test_what_is_not_installed_is_an_error_before_anything_is_drawn(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchmetrics", "dreamsim")]:
        monkeypatch.delitem(sys.modules, name)
    for package in ("torchmetrics", "dreamsim"):
        monkeypatch.setitem(sys.modules, package, None)
    for metric, package in (("fid", "torchmetrics"), ("distance:dreamsim", "dreamsim")):
        line = refused(*MODEL, "diversity", "--metric", metric, "--output", tmp_path / "out", "--no-plot")
        assert f"needs {package}: pip install 'negengine[evaluate]'" in line
    assert not (tmp_path / "out").exists()


def test_pictures_are_never_written_over(tmp_path):
    (tmp_path / "images").mkdir()
    assert "images exists; choose another --output" in refused(*MODEL, "diversity", "--output", tmp_path, "--no-plot")


def test_results_are_never_written_over(run):
    folder, _ = run
    before = {file.name: file.read_bytes() for file in folder.glob("evaluate.*")}
    assert len(before) == 3
    images = folder / "images"
    line = refused(images / "without", images / "negtome", "--output", folder, "--no-plot", "--metric", "vendi")
    assert "evaluate.json exists; choose another --output, or remove it" in line
    assert "evaluate.json exists" in refused(*MODEL, "diversity", "--output", folder, "--no-keep", "--no-plot")
    assert {file.name: file.read_bytes() for file in folder.glob("evaluate.*")} == before


def test_each_reader_finds_its_own_class_in_a_prompt():
    asked = asked_for(["as-prompted:jobs", "prompt-probability:looks"])
    readers = {"jobs": SimpleNamespace(classes=("cook", "judge")), "looks": SimpleNamespace(classes=("a tall cook", "a judge"))}
    found = expected_of([Drawn("one", ())], lambda drawn: ["a tall cook, sitting"], asked, readers)
    assert found == {"jobs": {"one": ["cook"]}, "looks": {"one": ["a tall cook"]}}


def test_labels_of_a_file_tell_what_is_as_prompted_and_what_is_absent(folders):
    (folders / "labels.csv").write_text("name,label\ncat-0.png,tabby\ncat-1.png,cat\ncat-2.png,cat\ncat-3.png,cat\n")
    (folders / "prompts.json").write_text('{"cat": "a photo of a cat"}')
    both = ("--labels", folders / "labels.csv", "--prompts-of", folders / "prompts.json")
    wanted = ("--metric", "as-prompted", "--metric", "forbidden", "--forbidden", "elk")
    result = evaluate(folders / "one", *both, *wanted, "--output", folders / "out", "--no-plot")
    assert result.exit_code == 0, result.output
    assert means(folders / "out") == {("one", "as-prompted:file"): 0.75, ("one", "forbidden:file"): 0}
    (folders / "prompts.json").write_text('{"cat": "a photo of a dog"}')
    assert "--class NAME for one that no label" in refused(folders / "one", *both, *wanted, "--output", folders / "b", "--no-plot")
    result = evaluate(folders / "one", *both, *wanted, "--class", "dog", "--output", folders / "b", "--no-plot")
    assert result.exit_code == 0, result.output
    assert means(folders / "b")["one", "as-prompted:file"] == 0
    files = {"labels": str(folders / "labels.csv"), "prompts_of": str(folders / "prompts.json")}
    flags = files | {"classes": ["dog"], "forbidden": "elk", "per_group": 4}
    evaluate(folders / "one", *both, *wanted, "--class", "dog", "--per-group", 4, "--output", folders / "c", "--no-plot")
    told = results.read(folders / "c" / "evaluate.json")["settings"]
    assert {name: told[name] for name in flags} == flags


def test_an_output_that_cannot_be_written_is_an_error_before_anything_is_drawn(folders, monkeypatch):
    for module, early in (("running", "load"), ("folders", "read_folder")):
        monkeypatch.setattr(importlib.import_module(f"negengine.cli.evaluate.{module}"), early, None)
    for arguments in ((folders / "one", "--metric", "vendi:pixels"), (*MODEL, "diversity", "--no-keep")):
        for output in ("labels.csv", "labels.csv/below"):
            line = refused(*arguments, "--output", folders / output, "--no-plot")
            assert "labels.csv" in line
            assert "cannot be written to" in line


def test_real_images_of_another_size_are_an_error_after_the_first_group(folders):
    fid = ("--metric", "reference-distance:pixels", "--against", folders / "one", "--prompt", "digit two", "--prompt", "digit six")
    line = refused(*MODEL, "diversity", *fid, "--groups-a-call", 1, "--output", folders / "out", *QUICK)
    assert "--against: its images have 4 x 4 pixels, and those that are judged 32 x 32" in line
    assert not list((folders / "out").rglob("*.png"))


def test_pictures_and_results_tell_what_each_was_drawn_with(tmp_path):
    (tmp_path / "lines.txt").write_text("a thin {prompt}\na bold {prompt}\n")
    (tmp_path / "not.txt").write_text("blurry\n")
    own = (
        "--variant",
        "rewriting",
        "--rewrite",
        tmp_path / "lines.txt",
        "--variant",
        "mine",
        "--negatives",
        f"mine={tmp_path}/not.txt",
    )
    one = ("--prompt", "digit two", "--images", 2, "--seed", 0, "--metric", "vendi")
    result = evaluate(*MODEL, "diversity", *own, *one, "--output", tmp_path / "out", *QUICK)
    assert result.exit_code == 0, result.output
    told = results.read(tmp_path / "out" / "evaluate.json")
    assert told["settings"]["rewrite"] == str(tmp_path / "lines.txt")
    assert told["settings"]["negatives"] == [f"mine={tmp_path}/not.txt"]
    assert list(told["variants"]["rewriting"]["texts"].values()) == ["a thin digit two", "a bold digit two"]
    assert list(told["variants"]["mine"]["negative_prompts"].values()) == ["blurry", "blurry"]
    rewritten, mine = (
        [png.read(file) for file in sorted((tmp_path / "out" / "images" / name).glob("*.png"))] for name in ("rewriting", "mine")
    )
    assert [(file["prompt"], file["text"]) for file in rewritten] == [
        ("digit two", "a thin digit two"),
        ("digit two", "a bold digit two"),
    ]
    assert [file["negative prompt"] for file in mine] == ["blurry", "blurry"]
