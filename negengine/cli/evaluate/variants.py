"""The variants that ``--variant`` names, from methods and files, with the settings that other flags say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from negengine.cli.choice import APPLIED, AVOIDED, choose
from negengine.evaluate.draw import Negative, Rewrite, Variant
from negengine.evaluate.prompting import RANDOM, STANDARD, chosen_by_seed, negatives
from negengine.methods import DiffusionNegativePrompt, Method

WITHOUT, REWRITING, DNP = "without", "rewriting", "dnp"
ASSETS = ("asset", "asset-masked")
OWN_NEGATIVES = {"standard": STANDARD, "random": RANDOM}


@dataclass(frozen=True, eq=False, kw_only=True)
class Parts:
    """What variants may be made of, beside the methods.

    Attributes:
        model: an embedded one has settings of its own. images: of a group.
        sets, avoid: as the flags. usual_avoid: what is avoided where ``avoid`` is None.
        calls: variant -> arguments of the pipeline's call.
        asset, mask: of the protocol ``asset``. rewrite: rewritten prompts. negatives: name -> negative prompts.
        captioner: makes the captioner of ``dnp``, when there is such a variant.
    """

    model: str
    images: int
    sets: Sequence[str] = ()
    avoid: str | None = None
    usual_avoid: str | None = None
    calls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    asset: Path | None = None
    mask: Path | None = None
    rewrite: Rewrite | None = None
    negatives: Mapping[str, Negative] = field(default_factory=dict)
    captioner: Callable[[], Any] | None = None

    def known(self) -> list[str]:
        return [WITHOUT, *APPLIED, REWRITING, DNP, *ASSETS, *self.negatives]


def variants(names: Sequence[str], parts: Parts) -> list[Variant]:
    """One for each name: ``without``, a method or ``METHOD:PRESET``, or several joined by ``+``.

    Raises:
        ValueError: a name that does not exist, a setting or an argument for a variant that is not there, or what a method refuses.
    """
    pieces = {name: name.split("+") for name in names}
    methods = {name: [part for part in found if _method(part) in APPLIED] for name, found in pieces.items()}
    acting = {_method(part) for found in methods.values() for part in found} | {
        "negtome" for name in names if _assets(pieces[name])
    }
    _check_flags(parts, names, acting)
    return [_variant(name, pieces[name], methods[name], parts) for name in names]


def negatives_named(texts: Sequence[str]) -> dict[str, Negative]:
    """``standard`` and ``random``, and those that ``NAME=FILE`` tells. Raises ValueError for another form or a name of a method."""
    found: dict[str, Negative] = {name: chosen_by_seed(lines) for name, lines in OWN_NEGATIVES.items()}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--negatives {text}: write NAME=FILE, as in --negatives semantic=opposites.json")
        if name in (WITHOUT, REWRITING, DNP, *ASSETS, *APPLIED) or "+" in name or "." in name:
            raise ValueError(f"--negatives {text}: {name} cannot be the name of negative prompts; take another")
        found[name] = negatives(Path(path))
    return found


def calls_of(texts: Sequence[str], names: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Arguments of the pipeline's call for all variants, and those of single ones, from ``[VARIANT.]KEY=VALUE``.

    Raises:
        ValueError: another form, or something twice.
    """
    common: dict[str, Any] = {}
    single: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in texts:
        path, equals, value = text.partition("=")
        name, dot, key = path.rpartition(".")
        if not (equals and key.isidentifier()) or (dot and name not in single):
            there = f"; the variants are {', '.join(names)}" if dot else ""
            raise ValueError(f"--call {text}: write [VARIANT.]KEY=VALUE, as in --call guidance_scale=5{there}")
        target = single[name] if dot else common
        if key in target:
            raise ValueError(f"--call {path} is given twice")
        try:
            target[key] = json.loads(value)
        except ValueError:
            target[key] = value
    return common, single


def _method(part: str) -> str:
    return part.partition(":")[0]


def _assets(pieces: Sequence[str]) -> list[str]:
    return [part for part in pieces if part in ASSETS]


def _check_flags(parts: Parts, names: Sequence[str], acting: set[str]) -> None:
    pieces = {piece for name in names for piece in name.split("+")}
    own = [(f"--negatives {name}", True, name) for name in parts.negatives if name not in OWN_NEGATIVES]
    for flag, given, piece in (("--rewrite", parts.rewrite, REWRITING), ("--mask", parts.mask, "asset-masked"), *own):
        if given is not None and piece not in pieces:
            raise ValueError(f"{flag} is for the variant {piece}, which is not there; there are {', '.join(names)}")
    for text in parts.sets:
        if (name := text.partition(".")[0]) not in acting:
            raise ValueError(f"--set {text}: no variant uses {name}; the variants are {', '.join(names)}")
    if parts.avoid is not None and not any(name in AVOIDED for name in acting):
        raise ValueError(f"--avoid is for variants that avoid a prompt: {', '.join(AVOIDED)}; there are {', '.join(names)}")


def _variant(name: str, pieces: Sequence[str], methods: Sequence[str], parts: Parts) -> Variant:
    strange = [part for part in pieces if _method(part) not in APPLIED and part not in parts.known()]
    if strange:
        raise ValueError(f"there is no variant {strange[0]!r}; there are {', '.join(parts.known())}, and several joined by +")
    if WITHOUT in pieces and len(pieces) > 1:
        raise ValueError(f"the variant {name}: {WITHOUT} stands alone")
    assets = _assets(pieces)
    if assets and (parts.asset is None or len(assets) > 1 or "negtome" in map(_method, methods)):
        raise ValueError(
            f"the variant {name}: {' and '.join(assets)} is NegToMe away from --asset, once, and beside other methods only"
        )
    if assets == ["asset-masked"] and parts.mask is None:
        raise ValueError(f"the variant {name} needs --mask")
    if REWRITING in pieces and parts.rewrite is None:
        raise ValueError(f"the variant {name} needs --rewrite FILE, the rewritten prompts")
    texts = [part for part in pieces if part in parts.negatives]
    if len(texts) > 1 or (texts and DNP in pieces):
        raise ValueError(
            f"the variant {name}: {' and '.join([*texts, *([DNP] if DNP in pieces else [])])} both give the negative prompt"
        )
    if DNP in pieces and (REWRITING in pieces or parts.captioner is None):
        raise ValueError(f"the variant {name}: dnp needs a captioner (--captioner), and draws the prompts as they are")
    made = Variant(
        name=name,
        methods=_methods(methods, assets, parts, grouped=REWRITING not in pieces and not texts and DNP not in pieces),
        call=parts.calls.get(name, {}),
        rewrite=parts.rewrite if REWRITING in pieces else None,
        negative=parts.negatives[texts[0]] if texts else None,
        dnp=DiffusionNegativePrompt(captioner=parts.captioner()) if DNP in pieces and parts.captioner else None,
    )
    made.methods(0)  # a setting that cannot work is an error before a model is loaded
    return made


def _methods(methods: Sequence[str], assets: Sequence[str], parts: Parts, grouped: bool) -> Callable[[int], Sequence[Method]]:
    """Seed -> methods.

    Args:
        grouped: the pipeline is given each prompt once, and so tells which images share it.
    """
    if not methods and not assets:
        return lambda seed: ()
    names = [*(["negtome"] if assets else []), *methods]
    short = {_method(name) for name in names}
    sets = [text for text in parts.sets if text.partition(".")[0] in short]
    avoid = parts.usual_avoid if parts.avoid is None else parts.avoid
    avoided = [avoid] if avoid is not None and any(name in AVOIDED for name in short) else []
    mask = str(parts.mask) if assets == ["asset-masked"] else None
    flags = {"reference": [{"image": str(parts.asset), "mask": mask}]} if assets else {}
    size = None if grouped else parts.images
    return lambda seed: choose(parts.model, seed, names, sets, flags, avoided, group_size=size)
