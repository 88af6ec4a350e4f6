"""Which methods act, and with which settings: from flags, a file and what an embedded model has of its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from negengine.methods import KINDS, Method
from negengine.methods.base import check_owners
from negengine.methods.plain import as_plain, from_plain

NONE = "none"
DRIVER = "dnp"  # drives two runs; it is not applied to a pipeline
APPLIED = {name: kind for name, kind in KINDS.items() if name != DRIVER}
AVOIDED = {"dng": "prompt", "negative-prompting": "prompt", "sld": "prompt", "nag": "negative_prompt"}
WORDS = {"prompt", "negative_prompt", "cfg_prompt"}  # settings that are texts: "3" is one too
LISTS = {"blocks"}  # a text that is no list is its only member

METHOD_HELP = (
    "A method, NAME or NAME:PRESET; repeatable; `negengine methods` lists them. negtome if left out; none: no method. "
    "Only the named ones act, with what --settings or --like say of them."
)
METHODS_OF_THE_FINAL_RUN = (
    "A method that acts on the final images, NAME or NAME:PRESET; repeatable; `negengine methods` lists them."
)
SET_HELP = "A setting of a method, NAME.KEY=VALUE; repeatable. VALUE is read as JSON, or else as text."
AVOID_HELP = "What the method that avoids a prompt is to avoid: dng, negative-prompting, sld or nag."
ONE_FOR_EACH = " Repeatable: one text for all prompts, or one for each."


def choose(
    model: str,
    seed: int,
    methods: Sequence[str] = (),
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    avoid: Sequence[str] = (),
    filed: Sequence[Mapping[str, Any]] | None = None,
    filed_seed: object = None,
    group_size: int | None = None,
) -> list[Method]:
    """The methods' settings: those of flags, then of a preset that a flag names, of the file, of the model, and the defaults.

    Args:
        model: an embedded one has settings of its own.
        seed: of the call, also that of every method that has one, unless another is set.
        methods: ``NAME`` or ``NAME:PRESET``; those of ``filed`` if empty, and NegToMe without any.
        sets: ``NAME.KEY=VALUE``.
        flags: flag -> value, for the settings of NegToMe that have a flag.
        avoid: of the one method that avoids a prompt: a text for all prompts of the call, or one for each.
        filed: methods in the form of :mod:`negengine.methods.plain`.
        filed_seed: of the file's call: where a filed method has the same, it follows ``seed``.
        group_size: of NegToMe, where the call does not tell it.

    Raises:
        ValueError: a name that does not exist, what is given twice, a setting of a method that is not chosen or that cannot work.
    """
    of_file = _by_name(filed or ())
    asked = _asked(methods) if methods else dict.fromkeys(of_file if filed is not None else ["negtome"])
    check_owners(APPLIED[name] for name in asked)
    told = _told(asked, sets, flags or {}, avoid)
    chosen = []
    for name, preset in asked.items():
        own = {key: value for key, value in of_file.get(name, {}).items() if (key, value) != ("seed", filed_seed)}
        follows = {key: value for key, value in (("seed", seed), ("group_size", group_size)) if key in _fields(name)}
        named = APPLIED[name].presets[preset] if preset else {}
        chosen.append(_made(name, {**_model_own(model, name), **follows, **own, **named, **told[name]}))
    return chosen


def one_or_each(texts: Sequence[str]) -> str | list[str]:
    """A flag that may be repeated: one text is for all prompts."""
    return texts[0] if len(texts) == 1 else list(texts)


def one_text(flag: str, texts: Sequence[str] | None) -> str | None:
    """A flag that may be given once. Raises ValueError for several texts, of which click itself would drop all but the last."""
    if texts and len(texts) > 1:
        raise ValueError(f"--{flag} is given {len(texts)} times; this command takes one text, for all prompts")
    return texts[0] if texts else None


def negtome_flags(
    alpha: float | None,
    threshold: float | None,
    timesteps: tuple[float, float] | None,
    reference: Sequence[str] | None,
    mask: Sequence[Path] | None,
) -> dict[str, Any]:
    """The settings of NegToMe that have a flag of their own, by flag. Raises ValueError for pictures and masks that do not fit."""
    given: dict[str, Any] = {"alpha": alpha, "threshold": threshold, "timesteps": timesteps and list(timesteps)}
    if reference or mask:
        given["reference"] = _references(reference or ["first"], mask or [])
    return {name: value for name, value in given.items() if value is not None}


def _references(names: Sequence[str], masks: Sequence[Path]) -> str | list[dict[str, str | None]]:
    if names[0] in ("first", "others", "previous"):
        if len(names) > 1 or masks:
            raise ValueError(f"--reference {names[0]} stands alone; several references and masks are for pictures")
        return names[0]
    if masks and len(masks) != len(names):
        raise ValueError(f"{len(names)} reference pictures, but {len(masks)} masks; give one for each or none")
    for what, path in [*(("reference", Path(name)) for name in names), *(("mask", mask) for mask in masks)]:
        if not path.is_file():
            raise ValueError(f"--{what} {path} is neither first, others, previous nor a file")
    paths: list[str | None] = [*map(str, masks)] or [None] * len(names)
    return [{"image": name, "mask": mask} for name, mask in zip(names, paths, strict=True)]


def _asked(methods: Sequence[str]) -> dict[str, str]:
    """Name -> preset, empty for none."""
    if NONE in methods:
        if len(methods) > 1:
            raise ValueError("--method none stands alone")
        return {}
    found: dict[str, str] = {}
    for text in methods:
        name, _, preset = text.partition(":")
        _known(name)
        if name in found:
            raise ValueError(f"--method {name} is given twice")
        if preset or text.endswith(":"):
            presets = APPLIED[name].presets
            if preset not in presets:
                there = f"there are {', '.join(f'{name}:{known}' for known in presets)}" if presets else f"{name} has none"
                raise ValueError(f"--method {text}: no preset {preset!r}; {there}")
        found[name] = preset
    return found


def _known(name: object) -> None:
    if name == DRIVER:
        raise ValueError("dnp draws twice and is no method to apply; `negengine negative` does that")
    if not isinstance(name, str) or name not in APPLIED:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(APPLIED)}")


def _told(asked: Iterable[str], sets: Sequence[str], flags: Mapping[str, Any], avoid: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Method -> settings that flags name."""
    told: dict[str, dict[str, Any]] = {name: {} for name in asked}
    for text in sets:
        name, key, value = _set(text)
        if name not in told:
            raise ValueError(f"--set {name}.{key}: {name} is not chosen; add --method {name}")
        if key in told[name]:
            raise ValueError(f"--set {name}.{key} is given twice")
        told[name][key] = value
    for flag, value in flags.items():
        if "negtome" not in told:
            others = [f"--set {name}.{flag}=…" for name in told if flag in _fields(name)]
            raise ValueError(f"--{flag} sets NegToMe, which is not chosen; {' or '.join(['add --method negtome', *others])}")
        if flag in told["negtome"]:
            raise ValueError(f"--{flag} and --set negtome.{flag} say the same; drop one")
        told["negtome"][flag] = value
    if avoid:
        name = _avoider(told)
        if AVOIDED[name] in told[name]:
            raise ValueError(f"--avoid and --set {name}.{AVOIDED[name]} say the same; drop one")
        told[name][AVOIDED[name]] = one_or_each(avoid)
    return told


def _set(text: str) -> tuple[str, str, Any]:
    path, equals, value = text.partition("=")
    name, dot, key = path.partition(".")
    if not (equals and dot and key):
        raise ValueError(f"--set {text}: write NAME.KEY=VALUE, as in --set dng.scale=3")
    _known(name)
    if key not in _fields(name):
        raise ValueError(f"--set {path}: {name} has no setting {key!r}; there are {', '.join(_fields(name))}")
    try:
        parsed = json.loads(value)
    except ValueError:
        return name, key, [value] if key in LISTS else value
    return name, key, value if key in WORDS and not isinstance(parsed, str | list) else parsed


def _avoider(told: Mapping[str, Any]) -> str:
    """The one method that avoids a prompt."""
    found = [name for name in told if name in AVOIDED]
    if not found:
        ways = ", ".join(f"--method {name}" for name in AVOIDED)
        raise ValueError(f"--avoid is for a method that avoids a prompt: {ways}; --negative-prompt is the pipeline's own way")
    if len(found) > 1:
        ways = " and ".join(f"--set {name}.{AVOIDED[name]}=…" for name in found)
        raise ValueError(f"--avoid could be that of {' or '.join(found)}; use {ways}")
    return found[0]


def _by_name(filed: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in filed:
        if not isinstance(entry, Mapping) or "method" not in entry:
            raise ValueError(f"methods of a file are mappings such as {{method: cads, tau1: 0.5}}, got {entry!r}")
        name = entry["method"]
        _known(name)
        if name in found:
            raise ValueError(f"the file has {name} twice")
        found[name] = {key: value for key, value in entry.items() if key != "method"}
    return found


def _model_own(model: str, name: str) -> dict[str, Any]:
    """An embedded model has settings of its own; other models have their family's defaults."""
    from negengine import models

    if name != "negtome" or model not in models.NAMES:
        return {}
    return {key: value for key, value in as_plain(models.negtome_preset(model)).items() if key != "method"}


def _made(name: str, settings: Mapping[str, Any]) -> Method:
    fields = {field.name: field for field in dataclasses.fields(APPLIED[name])}
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in settings]
    if missing:
        ways = ["--avoid TEXT" if AVOIDED.get(name) == key else f"--set {name}.{key}=…" for key in missing]
        raise ValueError(f"{name} needs {' and '.join(missing)}: give {' '.join(ways)}")
    try:
        return from_plain({"method": name} | dict(settings))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _fields(name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(APPLIED[name])]
