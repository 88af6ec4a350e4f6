"""What all methods have in common: names, presets, frozen, keyword only, no setting that cannot work."""

import dataclasses
import math
import re

import pytest
import torch
from PIL import Image

from negengine import methods
from negengine.methods import (
    CADS,
    KINDS,
    DiffusionNegativePrompt,
    DynamicNegativeGuidance,
    Embeddings,
    GuidanceInterval,
    Method,
    NegativePrompting,
    NegToMe,
    NormalizedAttentionGuidance,
    SafeLatentDiffusion,
    SeedVariance,
)

NEEDED = {
    "dng": {"prompt": "a dog"},
    "negative-prompting": {"prompt": "a dog"},
    "guidance-interval": {"low": 0.28, "high": 5.42},
    "dnp": {"captioner": lambda picture: "a cat"},
}  # what has no default
PROMPTS = [
    (7, TypeError, "must be a text, a sequence of texts .* or Embeddings, got 7"),
    (None, TypeError, "must be a text, .* got None"),
    (b"dog", TypeError, "must be a text"),
    (["a", 1], TypeError, "must be a text"),
    ([], ValueError, "is an empty sequence; give one text per prompt"),
    (torch.zeros(1, 2, 3), TypeError, r"is a tensor \[1, 2, 3\]; wrap embeddings: Embeddings"),
]


def made(name, **settings):
    return KINDS[name](**{**NEEDED.get(name, {}), **settings})


def test_names():
    kinds = [one for name in methods.__all__ if isinstance(one := getattr(methods, name), type) and issubclass(one, Method)]
    assert sorted(KINDS) == sorted(kind.name for kind in kinds if kind is not Method)
    assert len(KINDS) == 9
    assert all(kind.name == name and re.fullmatch(r"[a-z-]+", name) for name, kind in KINDS.items())
    assert len({kind.title for kind in KINDS.values()}) == 9


def test_who_owns_the_prediction():
    owners = {name for name, kind in KINDS.items() if kind.owns_prediction}
    assert owners == {"dng", "negative-prompting", "sld", "guidance-interval"}


@pytest.mark.parametrize("name", KINDS)
def test_frozen_keyword_only_and_comparable(name):
    settings = made(name)
    assert settings == made(name)
    for field in dataclasses.fields(settings):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, field.name, None)
    with pytest.raises(TypeError, match="positional argument"):
        KINDS[name](1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidance_scale'"):
        made(name, guidance_scale=1)


@pytest.mark.parametrize("name", KINDS)
def test_every_preset_works(name):
    for preset, values in KINDS[name].presets.items():
        settings = KINDS[name].preset(preset, **NEEDED.get(name, {}))
        assert type(settings) is KINDS[name]
        assert {key: getattr(settings, key) for key in values} == values
        changed = next(iter(values))
        assert getattr(KINDS[name].preset(preset, **NEEDED.get(name, {}), **{changed: 1}), changed) == 1


@pytest.mark.parametrize("name", KINDS)
def test_an_unknown_preset_names_the_known(name):
    known = ", ".join(map(repr, KINDS[name].presets)) or "it has none"
    with pytest.raises(ValueError, match=f"unknown preset 'best' of {KINDS[name].title}; .*{known}$"):
        KINDS[name].preset("best")


def test_what_a_preset_changes_is_checked():
    with pytest.raises(ValueError, match="tau must be 0 or more"):
        DynamicNegativeGuidance.preset("paper", prompt="a", tau=-1)
    with pytest.raises(TypeError, match="'prompt'"):
        DynamicNegativeGuidance.preset("paper")


def test_published_numbers():
    """Spec sections 2 and 4, written out once more."""

    def dng(preset):
        s = DynamicNegativeGuidance.preset(preset, prompt="a")
        return s.scale, s.prior, s.tau, s.delta, s.p_min, s.p_max, s.variance

    assert dng("paper") == (5, 0.01, 0.2, 2e-4, 1e-6, 0.8, "posterior")
    assert dng("release") == (5, 0.01, 0.2, 0, 1e-6, 0.8, "release")
    assert dng("feast") == (27, 0.01, 0.2, 0.004, 1e-6, 0.99, "posterior")
    assert dng("dinner") == (12, 0.01, 0.3, 0.003, 1e-6, 0.99, "posterior")
    assert dng("workshop") == (27, 0.01, 0.2, 0.002, 1e-6, 0.99, "posterior")
    assert dng("antique") == (21, 0.01, 0.2, 0.004, 1e-6, 0.99, "posterior")
    assert dng("breakfast") == (18, 0.01, 0.3, 0.003, 1e-6, 0.99, "posterior")
    default = DynamicNegativeGuidance(prompt="a")
    assert (default.scale, default.prior, default.tau, default.delta, default.p_min, default.p_max) == (5, 0.2, 1, 0, 1e-6, 0.99)

    def sld(s):
        return s.warmup, s.scale, s.threshold, s.momentum_scale, s.momentum, s.variant, s.outer

    assert sld(SafeLatentDiffusion.preset("weak")) == (15, 20, 0, 0, 0, "paper", 1)
    assert sld(SafeLatentDiffusion.preset("medium")) == (10, 1000, 0.01, 0.3, 0.4, "paper", 1)
    assert sld(SafeLatentDiffusion.preset("strong")) == (7, 2000, 0.025, 0.5, 0.7, "paper", 1)
    assert sld(SafeLatentDiffusion.preset("max")) == (0, 5000, 1, 0.5, 0.7, "paper", 1)
    assert sld(SafeLatentDiffusion.preset("dng")) == (0, 100, 0.04, 0.2, 0.1, "dng", 1)
    assert SafeLatentDiffusion() == SafeLatentDiffusion.preset("medium")
    assert CADS() == CADS(tau1=0.6, tau2=0.9, scale=0.25, psi=1)
    assert SeedVariance.preset("release") == SeedVariance(share=0.5, strength=20, relative=False, timesteps=(800, 1000))
    paper = DiffusionNegativePrompt.preset("paper", captioner=str)
    assert (paper.steps, paper.guidance) == (41, 7.5)


@pytest.mark.parametrize(
    "name,defaults",
    [
        ("dng", {"variance": "posterior", "surrogate": None, "negative": "raw", "cfg": None, "cfg_prompt": ""}),
        ("negative-prompting", {"scale": 1, "negative": "raw", "cfg": None, "cfg_prompt": ""}),
        ("nag", {"negative_prompt": "", "scale": None, "tau": None, "alpha": None, "timesteps": (0, 1000), "blocks": None}),
        ("cads", {"seed": 0}),
        ("seed-variance", {"share": 0.5, "strength": 1, "relative": True, "timesteps": (800, 1000), "seed": 0}),
        ("dnp", {"steps": None, "guidance": None, "keep_own": True}),
    ],
)
def test_defaults(name, defaults):
    assert {key: getattr(made(name), key) for key in defaults} == defaults


@pytest.mark.parametrize(
    "name,settings,error,message",
    [
        *[("dng", {"prompt": value}, error, f"^prompt {text}") for value, error, text in PROMPTS],
        *[("dng", {"cfg_prompt": value}, error, f"^cfg_prompt {text}") for value, error, text in PROMPTS],
        *[("negative-prompting", {"prompt": value}, error, f"^prompt {text}") for value, error, text in PROMPTS],
        *[("negative-prompting", {"cfg_prompt": value}, error, f"^cfg_prompt {text}") for value, error, text in PROMPTS],
        *[("sld", {"prompt": value}, error, f"^prompt {text}") for value, error, text in PROMPTS],
        *[("nag", {"negative_prompt": value}, error, f"^negative_prompt {text}") for value, error, text in PROMPTS],
        ("dng", {"scale": -1}, ValueError, "scale must be 0 or more, got -1"),
        ("dng", {"scale": math.nan}, ValueError, "scale must be finite"),
        ("dng", {"scale": "5"}, TypeError, "scale must be a number, got '5'"),
        ("dng", {"prior": 0}, ValueError, r"prior must lie in \(0, 1\), got 0"),
        ("dng", {"prior": 1.0}, ValueError, r"prior must lie in \(0, 1\), got 1.0"),
        ("dng", {"tau": -0.1}, ValueError, "tau must be 0 or more"),
        ("dng", {"tau": None}, TypeError, "tau must be a number, got None"),
        ("dng", {"delta": math.inf}, ValueError, "delta must be finite"),
        ("dng", {"p_min": 0}, ValueError, r"p_min must lie in \(0, 1\)"),
        ("dng", {"p_max": 1}, ValueError, r"p_max must lie in \(0, 1\)"),
        ("dng", {"p_min": 0.5, "p_max": 0.5}, ValueError, "p_min must be below p_max, got 0.5 and 0.5"),
        ("dng", {"variance": "paper"}, ValueError, r"variance must be one of \('posterior', 'release'\), got 'paper'"),
        ("dng", {"surrogate": "ddim"}, ValueError, r"surrogate must be one of \(None, 'ancestral'\), got 'ddim'"),
        ("dng", {"negative": "guided"}, ValueError, r"negative must be one of \('raw', 'cfg'\)"),
        ("dng", {"cfg": -1}, ValueError, "cfg must be 0 or more"),
        ("dng", {"cfg": True}, TypeError, "cfg must be a number, got True"),
        ("negative-prompting", {"scale": -1}, ValueError, "scale must be 0 or more"),
        ("negative-prompting", {"negative": None}, ValueError, r"negative must be one of \('raw', 'cfg'\), got None"),
        ("negative-prompting", {"cfg": -1}, ValueError, "cfg must be 0 or more"),
        ("sld", {"scale": -1}, ValueError, "scale must be 0 or more"),
        ("sld", {"outer": -1}, ValueError, "outer must be 0 or more"),
        ("sld", {"threshold": math.nan}, ValueError, "threshold must be finite"),
        ("sld", {"warmup": -1}, ValueError, "warmup must be 0 or a positive integer, got -1"),
        ("sld", {"warmup": 1.0}, ValueError, "warmup must be 0 or a positive integer"),
        ("sld", {"warmup": True}, ValueError, "warmup must be 0 or a positive integer, got True"),
        ("sld", {"momentum_scale": 1.1}, ValueError, r"momentum_scale must lie in \[0, 1\], got 1.1"),
        ("sld", {"momentum_scale": -0.1}, ValueError, r"momentum_scale must lie in \[0, 1\]"),
        ("sld", {"momentum": 1}, ValueError, r"momentum must lie in \[0, 1\), got 1"),
        ("sld", {"variant": "release"}, ValueError, r"variant must be one of \('paper', 'dng'\), got 'release'"),
        ("nag", {"scale": 0.5}, ValueError, "scale must be 1 or more, got 0.5"),
        ("nag", {"tau": 0}, ValueError, "tau must be above 0, got 0"),
        ("nag", {"alpha": 1.5}, ValueError, r"alpha must lie in \[0, 1\], got 1.5"),
        ("nag", {"timesteps": None}, TypeError, r"timesteps must be \(low, high\), got None"),
        ("nag", {"timesteps": (2000, 3000)}, ValueError, "outside 0 … 1000, so NAG would never be active"),
        ("nag", {"blocks": "attn2"}, TypeError, "blocks must be a sequence of names, got 'attn2'"),
        ("nag", {"blocks": []}, ValueError, "blocks is empty, so nothing would be guided"),
        ("cads", {"tau1": -0.1}, ValueError, r"tau1 must lie in \[0, 1\], got -0.1"),
        ("cads", {"tau2": 1.1}, ValueError, r"tau2 must lie in \[0, 1\], got 1.1"),
        ("cads", {"tau1": 0.9, "tau2": 0.9}, ValueError, "tau1 must be below tau2, got 0.9 and 0.9"),
        ("cads", {"psi": 2}, ValueError, r"psi must lie in \[0, 1\], got 2"),
        ("cads", {"scale": -1}, ValueError, "scale must be 0 or more"),
        ("cads", {"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ("cads", {"seed": -(2**32)}, ValueError, "seed must lie between"),
        ("seed-variance", {"share": 1.01}, ValueError, r"share must lie in \[0, 1\], got 1.01"),
        ("seed-variance", {"strength": -1}, ValueError, "strength must be 0 or more"),
        ("seed-variance", {"relative": 1}, TypeError, "relative must be True or False, got 1"),
        ("seed-variance", {"timesteps": (900, 800)}, ValueError, "window 900 … 800 is empty"),
        ("seed-variance", {"timesteps": (1001, 1002)}, ValueError, "so the noise would never be active"),
        ("seed-variance", {"seed": None}, TypeError, "seed must be an integer"),
        ("guidance-interval", {"low": -1}, ValueError, "low must be 0 or more"),
        ("guidance-interval", {"low": math.inf}, ValueError, "low must be finite"),
        ("guidance-interval", {"high": math.nan}, ValueError, "high must be finite"),
        ("guidance-interval", {"high": "inf"}, TypeError, "high must be a number"),
        ("guidance-interval", {"low": 2, "high": 2}, ValueError, r"low must be below high \(noise levels\), got 2 and 2"),
        ("dnp", {"captioner": "blip"}, TypeError, "captioner must be a function of a picture .* got 'blip'"),
        ("dnp", {"steps": 0}, ValueError, "steps must be a positive integer, got 0"),
        ("dnp", {"guidance": 0}, ValueError, "guidance must be above 0, got 0"),
        ("dnp", {"keep_own": "yes"}, TypeError, "keep_own must be True or False, got 'yes'"),
    ],
)
def test_settings_that_cannot_work(name, settings, error, message):
    with pytest.raises(error, match=message) as caught:
        made(name, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name,settings",
    [
        ("dng", {"scale": 0, "tau": 0, "delta": -1, "prior": 1e-9, "cfg": 0, "surrogate": "ancestral", "negative": "cfg"}),
        ("negative-prompting", {"scale": 0, "negative": "cfg", "cfg": 3.5, "cfg_prompt": ["a", "b"]}),
        ("sld", {"scale": 0, "threshold": -1, "warmup": 0, "momentum_scale": 1, "momentum": 0, "outer": 0}),
        ("nag", {"scale": 1, "tau": 0.1, "alpha": 0}),
        ("nag", {"alpha": 1, "timesteps": (500, 500), "blocks": ["attn2"]}),
        ("cads", {"tau1": 0, "tau2": 1, "scale": 0, "psi": 0, "seed": -3}),
        ("seed-variance", {"share": 0, "strength": 0}),
        ("seed-variance", {"share": 1}),
        ("guidance-interval", {"low": 0, "high": math.inf}),
        ("dnp", {"steps": 1, "guidance": 0.1, "keep_own": False}),
    ],
)
def test_settings_at_the_edge_that_work(name, settings):
    kept = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    assert {key: getattr(made(name, **settings), key) for key in settings} == kept


def test_numbers_are_stored_as_floats():
    for settings in (made("dng", scale=5, tau=1, delta=0, cfg=3), made("cads", scale=1), made("nag", scale=5, tau=2, alpha=1)):
        for field in dataclasses.fields(settings):
            assert type(getattr(settings, field.name)) is not int or field.name == "seed"


def test_sequences_are_copied():
    prompts, blocks = ["a", "b"], ["attn2"]
    settings = NormalizedAttentionGuidance(negative_prompt=prompts, blocks=blocks)
    prompts.append("c")
    blocks.append("d")
    assert (settings.negative_prompt, settings.blocks) == (("a", "b"), ("attn2",))


def test_defaults_of_a_family_fill_what_was_left_open():
    settings = NormalizedAttentionGuidance(tau=2).with_defaults(scale=5, tau=2.5, alpha=0.25)
    assert type(settings) is NormalizedAttentionGuidance
    assert (settings.scale, settings.tau, settings.alpha) == (5, 2, 0.25)
    with pytest.raises(ValueError, match="alpha"):
        NormalizedAttentionGuidance().with_defaults(alpha=3)


def test_the_interval_is_open_below():
    interval = GuidanceInterval(low=0.28, high=5.42)
    assert [interval.active(sigma) for sigma in (0.1, 0.28, 0.29, 5.42, 5.43)] == [False, False, True, True, False]
    assert GuidanceInterval(low=0, high=math.inf).active(math.inf)


def test_a_captioner_is_kept():
    assert DiffusionNegativePrompt(captioner=lambda picture: str(picture.size)).captioner(Image.new("RGB", (2, 3))) == "(2, 3)"


@pytest.mark.parametrize(
    "prompt,pooled,error,message",
    [
        ("a dog", None, TypeError, r"prompt embeddings must be a tensor \[P, L, D\], got str"),
        (
            torch.zeros(1, 2, 3, dtype=torch.int64),
            None,
            TypeError,
            "prompt embeddings must be of a floating dtype, got torch.int64",
        ),
        (torch.zeros(2, 3), None, ValueError, r"must have the shape \[P, L, D\] and some elements, got \[2, 3\]"),
        (torch.zeros(0, 2, 3), None, ValueError, r"some elements, got \[0, 2, 3\]"),
        (torch.full((1, 2, 3), math.nan), None, ValueError, "prompt embeddings contain NaN or Inf"),
        (torch.zeros(1, 2, 3), [0.0], TypeError, r"pooled embeddings must be a tensor \[P, D\], got list"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), ValueError, r"pooled embeddings must have the shape \[P, D\]"),
        (torch.zeros(1, 2, 3), torch.full((1, 3), math.inf), ValueError, "pooled embeddings contain NaN or Inf"),
        (torch.zeros(2, 2, 3), torch.zeros(1, 3), ValueError, "the embeddings have 2 prompts, the pooled ones 1"),
    ],
)
def test_embeddings_that_cannot_work(prompt, pooled, error, message):
    with pytest.raises(error, match=message):
        Embeddings(prompt, pooled)


def test_embeddings_in_settings():
    """Settings that hold them are compared and hashed by which tensors they hold, with no wait on a device."""
    one, other = (Embeddings(torch.zeros(2, 4, 8, dtype=torch.float16), torch.zeros(2, 8)) for _ in range(2))
    assert NegativePrompting(prompt=one) == NegativePrompting(prompt=one) != NegativePrompting(prompt=other)
    assert hash(NegativePrompting(prompt=one)) == hash(NegativePrompting(prompt=one))
    assert NegativePrompting(prompt=one).prompt is one
    assert Embeddings(torch.empty(1, 4, 8, device="meta")).pooled is None


def test_negtome_is_a_method():
    assert isinstance(NegToMe(), Method)
    assert KINDS["negtome"] is NegToMe
