"""Settings as data and back, and settings from files."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from negengine.methods import (
    CADS,
    KINDS,
    DiffusionNegativePrompt,
    DynamicNegativeGuidance,
    Embeddings,
    GuidanceInterval,
    NegativePrompting,
    NegToMe,
    NormalizedAttentionGuidance,
    ReferenceImage,
    SafeLatentDiffusion,
    SeedVariance,
)
from negengine.methods.plain import as_plain, from_plain, read_settings

EVERY = [
    NegToMe(),
    NegToMe(alpha=(0.5, -0.5), threshold=np.float32(0.5), timesteps=(800, 1000), blocks=("up_blocks",), min_grid=16,
            reference="others", dropout=0.1, seed=-3, group_size=2, search="int8", backend="torch"),
    DynamicNegativeGuidance.preset("release", prompt="a dog", surrogate="ancestral", negative="cfg", cfg=3.5, cfg_prompt="blurry"),
    NegativePrompting(prompt=("a dog", "a cat"), scale=2),
    SafeLatentDiffusion.preset("dng", outer=2),
    NormalizedAttentionGuidance(negative_prompt="a dog", scale=5, blocks=("attn2",), timesteps=(0, 500)),
    CADS(tau1=0.1, tau2=0.2, scale=0.3, psi=0.4, seed=5),
    SeedVariance(share=0.25, strength=2, relative=False, timesteps=(900, 1000), seed=1),
    GuidanceInterval(low=0.28, high=5.42),
    GuidanceInterval(low=0.28, high=math.inf),
]  # fmt: skip


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 6), (1, 2, 3)).save(path)
    return path


@pytest.fixture
def mask(tmp_path):
    path = tmp_path / "mask.png"
    Image.new("L", (8, 6), 255).save(path)
    return path


@pytest.mark.parametrize("settings", EVERY, ids=lambda s: s.name)
def test_there_and_back(settings):
    plain = as_plain(settings)
    assert next(iter(plain.items())) == ("method", settings.name)
    back = from_plain(json.loads(json.dumps(plain)))
    assert type(back) is type(settings)
    assert back == settings


def test_every_method_was_tried():
    assert {settings.name for settings in EVERY} == set(KINDS) - {"dnp"}  # its captioner is a function


def test_all_settings_as_plain_numbers():
    settings = {"tau1": 0.6, "tau2": 0.9, "scale": 0.25, "psi": 1.0, "seed": 0, "pooled": True, "unconditional": False}
    assert as_plain(CADS()) == {"method": "cads", **settings}
    plain = as_plain(NegToMe(threshold=np.float32(0.5), alpha=[1, 2]))
    assert (type(plain["threshold"]), plain["alpha"], type(plain["alpha"])) == (float, [1, 2], list)


def test_pictures(picture, mask):
    settings = NegToMe(
        reference=[ReferenceImage(Image.open(picture), Image.open(mask), noise=False), ReferenceImage(Image.open(picture))]
    )
    plain = as_plain(settings)
    assert plain["reference"] == [
        {"image": str(picture), "mask": str(mask), "noise": False},
        {"image": str(picture), "mask": None, "noise": True},
    ]
    back = from_plain(json.loads(json.dumps(plain)))
    assert back == settings
    assert [p.mask is not None for p in back.pictures] == [True, False]
    one = from_plain({"method": "negtome", "reference": {"image": str(picture)}})
    assert one == NegToMe(reference=ReferenceImage(Image.open(picture)))


def test_pictures_are_read_at_once(picture):
    """A file that is cut short is refused here, not when the first image is made."""
    picture.write_bytes(picture.read_bytes()[:45])
    Image.open(picture)  # which reads its header only
    with pytest.raises(OSError, match="truncated"):
        from_plain({"method": "negtome", "reference": [{"image": str(picture)}]})


def test_pictures_without_a_file(picture, mask):
    made = Image.new("RGB", (8, 6))
    with pytest.raises(ValueError, match=r"the picture of negtome\.reference was not opened from a file; save it"):
        as_plain(NegToMe(reference=ReferenceImage(made)))
    with pytest.raises(ValueError, match=r"the mask of negtome\.reference was not opened from a file"):
        as_plain(NegToMe(reference=ReferenceImage(Image.open(picture), Image.new("L", (8, 6), 255))))


@pytest.mark.parametrize(
    "settings,message",
    [
        (NegToMe(alpha=lambda t: t), "negtome.alpha is function, which plain data cannot say: a function"),
        (DiffusionNegativePrompt(captioner=len), "dnp.captioner is .*: a function"),
        (NegativePrompting(prompt=Embeddings(torch.zeros(1, 2, 3))), "negative-prompting.prompt is Embeddings, .*: give its text"),
        ({"method": "cads"}, "settings of a method are needed, one of negtome, dng"),
        (CADS, "settings of a method are needed"),
    ],
)
def test_what_plain_data_cannot_say(settings, message):
    with pytest.raises(TypeError, match=message):
        as_plain(settings)


@pytest.mark.parametrize(
    "plain,error,message",
    [
        (["cads"], TypeError, "settings must be a mapping such as .*, got"),
        ({}, ValueError, 'settings need "method", one of negtome, .*; there are none'),
        ({"tau": 1}, ValueError, 'settings need "method", .*; there are tau'),
        ({"method": "dgn"}, ValueError, "unknown method 'dgn'; there are negtome, dng, .*interval"),
        ({"method": None}, ValueError, "unknown method None"),
        ({"method": ["cads"]}, ValueError, r"unknown method \['cads'\]"),
        ({"method": "cads", "tau": 1}, ValueError, "cads has no setting 'tau'; there are tau1, tau2, scale, psi, seed"),
        ({"method": "cads", 1: 1}, ValueError, "cads has no setting 1;"),
        ({"method": "cads", "name": "x"}, ValueError, "cads has no setting 'name'"),
        ({"method": "dng", "scale": 3}, ValueError, "dng needs prompt$"),
        ({"method": "guidance-interval"}, ValueError, "guidance-interval needs low, high$"),
        ({"method": "dnp"}, ValueError, "dnp needs captioner$"),
        ({"method": "cads", "psi": 2}, ValueError, "psi must lie in"),
        (
            {"method": "negtome", "reference": {"picture": "a.png"}},
            ValueError,
            "no setting 'picture'; there are image, mask, noise",
        ),
        ({"method": "negtome", "reference": {"noise": True}}, ValueError, 'needs "image", the path'),
        ({"method": "negtome", "reference": {"image": "no such file.png"}}, FileNotFoundError, "no such file.png"),
    ],
)
def test_data_that_is_no_method(plain, error, message):
    with pytest.raises(error, match=message):
        from_plain(plain)


def test_what_is_left_out_has_its_default():
    assert from_plain({"psi": 0.5, "method": "cads"}) == CADS(psi=0.5)
    assert from_plain({"method": "nag", "negative_prompt": ["a", "b"]}).negative_prompt == ("a", "b")


def test_files(tmp_path):
    plain = as_plain(DynamicNegativeGuidance(prompt="ein Hündchen"))
    (tmp_path / "a.json").write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")
    assert read_settings(tmp_path / "a.json") == plain
    assert read_settings(str(tmp_path / "a.json")) == plain


@pytest.mark.parametrize("ending", ["yaml", "yml", "YAML"])
def test_yaml(tmp_path, ending):
    pytest.importorskip("yaml")
    file = tmp_path / f"a.{ending}"
    file.write_text(
        "method: dng\nprompt: [ein Hündchen, 1e-6 m]\np_min: 1e-6\ndelta: -2E+3\nscale: 5\ncfg: null\n", encoding="utf-8"
    )
    settings = read_settings(file)
    assert settings["p_min"] == 1e-6  # PyYAML alone reads text
    assert from_plain(settings) == DynamicNegativeGuidance(prompt=("ein Hündchen", "1e-6 m"), p_min=1e-6, delta=-2000, scale=5)


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("a.toml", "", r"read from .json, .yaml or .yml, got .*a.toml"),
        ("a.json", "{", "a.json does not parse: .*line 1"),
        ("a.yaml", "a: [", "a.yaml does not parse: .*line 1"),
        ("a.json", "[1]", "a.json must hold a mapping .*, got list"),
        ("a.yaml", "", "a.yaml must hold a mapping .*, got NoneType"),
        ("b.yaml", "a: !!python/object:os.system x", "b.yaml does not parse"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, message):
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_settings(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_yaml_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "a.yml").write_text("a: 1")
    with pytest.raises(ModuleNotFoundError, match="pip install pyyaml"):
        read_settings(tmp_path / "a.yml")
