"""Which methods a command line chooses, and with which settings."""

import dataclasses
import json
import math
import re

import pytest
from typer.testing import CliRunner

from negengine import models
from negengine.cli import app
from negengine.cli.choice import APPLIED, AVOIDED, choose, negtome_flags
from negengine.cli.methods import ABOUT
from negengine.cli.words import ANCESTRAL, translated
from negengine.methods import KINDS, DynamicNegativeGuidance, GuidanceInterval, NegToMe, SafeLatentDiffusion
from negengine.methods.plain import as_plain


def chosen(*methods, model="a/model", seed=0, **given):
    return {settings.name: settings for settings in choose(model, seed, methods, **given)}


def test_negtome_is_the_default_with_the_models_own_settings():
    assert chosen() == {"negtome": NegToMe()}
    own = models.negtome_preset("mnist-sdxl")
    assert as_plain(chosen(model="mnist-sdxl", seed=3)["negtome"]) == as_plain(own) | {"seed": 3}
    assert chosen("none") == {}
    assert chosen(filed=[]) == {}


def test_every_method_and_every_setting_can_be_reached():
    examples = {"prompt": "a", "negative_prompt": "a", "cfg_prompt": "a", "low": 0, "high": 2, "timesteps": [1, 2], "blocks": "x"}
    for name, kind in APPLIED.items():
        keys = [field.name for field in dataclasses.fields(kind)]
        needed = [f"{name}.{key}={examples[key]}" for key in ("prompt", "low", "high") if key in keys]
        assert chosen(name, sets=needed)[name].name == name
        for key in keys:
            value = examples.get(key, getattr(kind, key, None))
            others = [text for text in needed if not text.startswith(f"{name}.{key}=")]
            text = value if isinstance(value, str) else json.dumps(value)
            found = getattr(chosen(name, sets=[*others, f"{name}.{key}={text}"])[name], key)
            wanted = ("x",) if key == "blocks" else tuple(value) if isinstance(value, list) else value
            assert found == wanted, f"{name}.{key}"


def test_values_are_json_or_text():
    sets = ["dng.scale=3", "dng.prompt=3", 'dng.cfg_prompt=["a", "b=c"]', "dng.surrogate=ancestral", "dng.cfg=null"]
    dng = chosen("dng", sets=sets)["dng"]
    assert (dng.scale, dng.prompt, dng.cfg_prompt, dng.surrogate, dng.cfg) == (3.0, "3", ("a", "b=c"), "ancestral", None)


@pytest.mark.parametrize("text", ["inf", "Infinity", "null"])
def test_an_endless_interval_can_be_typed_and_is_strict_json(text):
    endless = chosen("guidance-interval", sets=["guidance-interval.low=0", f"guidance-interval.high={text}"])["guidance-interval"]
    assert endless == GuidanceInterval(low=0, high=math.inf)
    plain = json.loads(json.dumps(as_plain(endless), allow_nan=False))
    assert plain == {"method": "guidance-interval", "low": 0.0, "high": None}
    assert chosen(filed=[plain])["guidance-interval"] == endless


def test_flags_come_before_named_presets_before_the_file_before_the_model():
    filed = [{"method": "dng", "prompt": "a", "scale": 2, "tau": 7, "p_max": 0.6, "negative": "cfg"}]
    dng = chosen("dng:feast", filed=filed, sets=["dng.tau=9"])["dng"]
    feast = DynamicNegativeGuidance.presets["feast"]
    assert (dng.tau, dng.scale, dng.delta, dng.p_max) == (9, feast["scale"], feast["delta"], feast["p_max"])
    assert (dng.prompt, dng.negative) == ("a", "cfg")
    assert chosen("dng", filed=filed)["dng"].tau == 7
    own = models.negtome_preset("mnist-sdxl")
    negtome = chosen(model="mnist-sdxl", filed=[{"method": "negtome", "alpha": 2}])["negtome"]
    assert (negtome.alpha, negtome.min_grid) == (2, own.min_grid)


def test_methods_have_the_seed_of_the_call_unless_another_is_set():
    filed = [{"method": "cads", "seed": 4}, {"method": "seed-variance", "seed": 5}]
    found = chosen(seed=9, filed=filed, filed_seed=4)
    assert (found["cads"].seed, found["seed-variance"].seed) == (9, 5)
    assert chosen("cads", seed=9, sets=["cads.seed=1"])["cads"].seed == 1


@pytest.mark.parametrize("name", AVOIDED)
def test_the_prompt_to_avoid_goes_to_the_method_that_avoids_one(name):
    found = chosen("cads", name, avoid=["a three"])
    assert getattr(found[name], AVOIDED[name]) == "a three"


@pytest.mark.parametrize(
    "methods, given, message",
    [
        (["dgn"], {}, "no method 'dgn'; there are negtome, dng, "),
        (["dnp"], {}, "`negengine negative` does that"),
        (["cads", "cads"], {}, "--method cads is given twice"),
        (["none", "cads"], {}, "--method none stands alone"),
        (["dng:fest"], {}, "no preset 'fest'; there are dng:paper, dng:release, dng:feast"),
        (["cads:a"], {}, "cads has none"),
        (["cads:"], {}, "no preset ''"),
        (["dng"], {}, "dng needs prompt: give --avoid TEXT"),
        (
            ["guidance-interval"],
            {"sets": ["guidance-interval.low=inf", "guidance-interval.high=inf"]},
            "guidance-interval: low must be a number, got 'inf'",
        ),
        (["guidance-interval"], {}, "give --set guidance-interval.low=… --set guidance-interval.high=…"),
        (["cads"], {"sets": ["dng.scale=3"]}, "dng is not chosen; add --method dng"),
        (["cads"], {"sets": ["dgn.scale=3"]}, "no method 'dgn'; there are"),
        (["cads"], {"sets": ["cads.tau=3"]}, "cads has no setting 'tau'; there are tau1, tau2"),
        (["cads"], {"sets": ["cads.tau1"]}, "write NAME.KEY=VALUE"),
        (["cads"], {"sets": ["tau1=1"]}, "write NAME.KEY=VALUE"),
        (["cads"], {"sets": ["cads.tau1=0.5", "cads.tau1=0.6"]}, "--set cads.tau1 is given twice"),
        (["cads"], {"sets": ["cads.seed=true"]}, "cads: seed must be an integer, got True"),
        (["cads"], {"sets": ["cads.scale=-1"]}, "cads: scale must be 0 or more"),
        (["nag"], {"flags": {"alpha": 1.0}}, "add --method negtome or --set nag.alpha=…"),
        (["negtome"], {"flags": {"alpha": 1.0}, "sets": ["negtome.alpha=1"]}, "--alpha and --set negtome.alpha say the same"),
        (["cads"], {"avoid": ["a"]}, "--avoid is for a method that avoids a prompt: --method dng"),
        (["dng", "sld"], {"avoid": ["a"]}, "DNG and SLD would both decide the prediction; take one of them alone"),
        (["dng", "nag"], {"avoid": ["a"]}, "use --set dng.prompt=… and --set nag.negative_prompt=…"),
        (["dng"], {"avoid": ["a"], "sets": ["dng.prompt=b"]}, "--avoid and --set dng.prompt say the same"),
        ([], {"filed": [{"method": "cads"}, {"method": "cads"}]}, "the file has cads twice"),
        ([], {"filed": [{"tau1": 0.5}]}, "methods of a file are mappings such as"),
        ([], {"filed": [{"method": "cads", "tau": 0.5}]}, "cads has no setting 'tau'"),
    ],
)
def test_what_cannot_be_meant_is_one_error(methods, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        chosen(*methods, **given)


def test_flags_of_negtome(tmp_path):
    assert negtome_flags(None, None, None, None, None) == {}
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").touch()
    found = negtome_flags(0.0, None, (1, 2), [str(tmp_path / "a.png")], [tmp_path / "b.png"])
    assert found == {
        "alpha": 0.0, "timesteps": [1, 2], "reference": [{"image": str(tmp_path / "a.png"), "mask": str(tmp_path / "b.png")}]
    }  # fmt: skip
    with pytest.raises(ValueError, match="2 reference pictures, but 1 masks"):
        negtome_flags(None, None, None, [str(tmp_path / "a.png")] * 2, [tmp_path / "b.png"])


def test_advice_names_flags():
    dng = DynamicNegativeGuidance(prompt="a")
    text = "switch to one that has (A, B), or set surrogate='ancestral'; `scale` is 0; raise guidance_scale, true_cfg_scale=1"
    rest = "--set dng.surrogate=ancestral; `--set dng.scale=…` is 0; raise --guidance, --true-cfg 1"
    assert translated(text, [dng]) == f"give {rest}"
    assert translated(text, [dng], [ANCESTRAL]) == f"give --scheduler {ANCESTRAL}, or {rest}"


def test_the_other_variant_of_sld_is_advised_with_its_numbers():
    found = translated("raise guidance_scale, or use variant='dng'", [SafeLatentDiffusion()])
    assert found == "raise --guidance, or give --method sld:dng"
    assert chosen("sld:dng")["sld"].scale == 100


def test_the_table_has_every_method():
    assert ABOUT.keys() == KINDS.keys()
    result = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert all(f"│ {name} " in result.output for name in KINDS)
    assert "paper, release, feast" in result.output


def test_a_narrow_terminal_cuts_no_name():
    output = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "80"}).output
    assert "…" not in output
    assert max(map(len, output.splitlines())) <= 80
    assert all(f"│ {name} " in output for name in KINDS)
    cells = [[cell.strip() for cell in line.split("│")] for line in output.splitlines()]
    presets = {name for line in cells if len(line) == 6 for name in re.findall(r"\w+", line[3])}
    assert presets >= {preset for name, kind in KINDS.items() if name != "dnp" for preset in kind.presets}
    words = {word for line in cells if len(line) == 6 for word in line[4].split()}
    assert words >= {word for _, needs in ABOUT.values() for word in needs.split()}
