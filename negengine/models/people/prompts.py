"""Prompts as people write them, from a profession alone to every attribute, and what a prompt names."""

from __future__ import annotations

import itertools
import re

import torch

from negengine.models.people.attributes import ATTRIBUTES, GENDERS, PROFESSIONS, STYLES, TONES


def with_article(text: str) -> str:
    """``"a artist"`` -> ``"an artist"``."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


PROMPTS: tuple[str, ...] = tuple(with_article(f"a {profession}") for profession in PROFESSIONS)
"""One prompt a profession that leaves the looks open, in the order of the professions."""

OPENINGS = ("", "", "", "", "a picture of ", "a portrait of ", "a photo of ", "a drawing of ", "an emoji of ")
OF_PROFESSION = ("a {profession}", "a {profession}", "a {profession}", "the {profession}", "{profession}")
OF_GENDER = (
    "a {gender} who is a {profession}",
    "a {gender} who is a {profession}",
    "a {gender} working as a {profession}",
    "a {sex} {profession}",
)
OF_TONE = ("a {profession} with {tone} skin", "a {profession} with {tone} skin", "the {profession} with {tone} skin")
OF_GENDER_AND_TONE = (
    "a {gender} who is a {profession} with {tone} skin",
    "a {gender} who is a {profession} with {tone} skin",
    "a {gender} with {tone} skin who is a {profession}",
    "a {gender} with {tone} skin working as a {profession}",
    "a {sex} {profession} with {tone} skin",
)
IN_STYLE = (", in {style} style", ", in {style} style", " in {style} style", ", {style} style", ", {style}")
SEXES = ("neutral", "male", "female")
SHARES = {"profession": 0.40, "everything": 0.35, "some": 0.25}
"""How often a prompt names the profession alone, every attribute, or the profession and one or two others."""
LATE_SHARES = {"profession": 0.25, "everything": 0.35, "some": 0.40}
"""The same where a model learns to listen: a look that one word asks for against the prevailing one is learned last."""

_GENDER_WORDS = {word: i for words in (GENDERS, SEXES) for i, word in enumerate(words)}
_PROFESSION = re.compile(rf"\b({'|'.join(PROFESSIONS)})\b")
_TONE = re.compile(rf"\b({'|'.join(sorted((tone.replace(' ', '[ -]') for tone in TONES), key=len, reverse=True))}) skin\b")


def write(labels: tuple[int, int, int, int], said: tuple[bool, bool, bool], generator: torch.Generator) -> str:
    """A random prompt for a picture with these attributes that names its profession and what of the others is ``said``."""

    def one_of(forms: tuple[str, ...]) -> str:
        return forms[int(torch.randint(len(forms), (), generator=generator))]

    def chance(p: float) -> bool:
        return bool(torch.rand((), generator=generator) < p)

    profession, gender, tone, style = labels
    forms = {
        (False, False): OF_PROFESSION,
        (True, False): OF_GENDER,
        (False, True): OF_TONE,
        (True, True): OF_GENDER_AND_TONE,
    }[said[:2]]
    text = one_of(OPENINGS) + one_of(forms) + (one_of(IN_STYLE) if said[2] else "")
    text = text.format(
        profession=PROFESSIONS[profession],
        gender=GENDERS[gender],
        sex=SEXES[gender],
        tone=TONES[tone].replace(" ", "-") if chance(0.5) else TONES[tone],
        style=STYLES[style],
    )
    text = with_article(text)
    return text.capitalize() if chance(0.1) else text


def named(prompt: str) -> tuple[int, int, int, int]:
    """The index of each attribute's value that a prompt names; the number of its values where it leaves it open."""
    text = prompt.lower()
    words = re.findall(r"[a-z]+", text)
    profession, tone = _PROFESSION.search(text), _TONE.search(text)
    genders = [_GENDER_WORDS[word] for word in words if word in _GENDER_WORDS]
    styles = [STYLES.index(word) for word in words if word in STYLES]
    return (
        PROFESSIONS.index(profession[1]) if profession else len(PROFESSIONS),
        genders[0] if genders else len(GENDERS),
        TONES.index(tone[1].replace("-", " ")) if tone else len(TONES),
        styles[0] if styles else len(STYLES),
    )


def vocabulary() -> tuple[str, ...]:
    """Every word of the grammar, sorted; a tone written with a hyphen is a word too."""
    templates = itertools.chain(OPENINGS, OF_PROFESSION, OF_GENDER, OF_TONE, OF_GENDER_AND_TONE, IN_STYLE)
    words = {word for template in templates for word in re.findall(r"(?<!\{)\b[a-z]+\b(?!\})", template)}
    values = itertools.chain(*ATTRIBUTES.values(), SEXES)
    words |= {"an", *(tone.replace(" ", "-") for tone in TONES), *(word for value in values for word in value.split())}
    return tuple(sorted(words))
