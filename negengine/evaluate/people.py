"""The world of ``people-flux`` and ``people-sdxl`` in the laboratory: who reads its pictures, and how a reading is said."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from negengine.metrics.extractors import Classes, Extractor, Loader, batched
from negengine.models import load_classifier
from negengine.models.people.attributes import ATTRIBUTES, GENDERS, PROFESSIONS, SIZE, STYLES, TONES
from negengine.models.people.pictures import all_people
from negengine.models.people.prompts import with_article
from negengine.models.people.world import DOMINANT

READER: Final = "people-classifier"
Look = tuple[str, str, str]


def sentence(profession: str, gender: str | None = None, tone: str | None = None, style: str | None = None) -> str:
    """A prompt that names these attributes and leaves the others open, in the words in which the models were taught."""
    text = f"a {gender} who is a {profession}" if gender else f"a {profession}"
    text += f" with {tone} skin" if tone else ""
    text += f", in {style} style" if style else ""
    return with_article(text)


LOOKS: tuple[Look, ...] = tuple((gender, tone, style) for gender in GENDERS for tone in TONES for style in STYLES)
EVERYTHING: tuple[str, ...] = tuple(sentence(profession, *look) for profession in PROFESSIONS for look in LOOKS)
"""A sentence for every profession with every look."""

COMPLETE: tuple[str, ...] = tuple(sentence(name, *LOOKS[(11 * number + 7) % len(LOOKS)]) for number, name in enumerate(PROFESSIONS))
"""A sentence for every profession with some look, most of them rare ones."""


class PeopleCaptioner:
    """Says all that the classifier reads, as in ``"a woman who is a judge with dark skin, in noto style"``."""

    identity = READER

    def __init__(self) -> None:
        self.classifier = load_classifier(name=READER)

    def __call__(self, image: Image.Image) -> str:
        if image.size != (SIZE, SIZE):
            raise ValueError(f"it reads people of {SIZE} x {SIZE} pixels, and the picture has {image.size[0]} x {image.size[1]}")
        return sentence(*values_of(self.classifier.read([image])[0]))


def values_of(labels: Tensor) -> tuple[str, ...]:
    """The words of a picture's labels ``[4]``: profession, gender, tone, style."""
    return tuple(values[int(label)] for values, label in zip(ATTRIBUTES.values(), labels, strict=True))


def ordinary(profession: str) -> Look:
    """The look that prevails in a profession, in the world from which the models learnt."""
    return DOMINANT[profession]


def open_prompt(forbidden: str, profession: str = "firefighter") -> tuple[str, str]:
    """A prompt that leaves the attribute of a class open, and the same prompt with that class named.

    The prompt names another skin tone than the one that prevails in this profession, or for a tone another gender, because the
    world is even there: what the prompt leaves open has equal shares. No profession is left open but by the empty prompt.

    Raises:
        ValueError: there is no such class.
    """
    attribute = attribute_of(forbidden)
    gender, tone, _ = ordinary(profession)
    if attribute == "profession":
        return "", sentence(forbidden)
    said = {"gender": _other(GENDERS, gender)} if attribute == "tone" else {"tone": _other(TONES, tone)}
    return sentence(profession, **said), sentence(profession, **{**said, attribute: forbidden})


HEAD = (8, 0, 56, 44)
"""Left, upper, right and lower edge of where heads are, in pixels."""


@dataclass(frozen=True, eq=False)
class Character:
    """A person to keep away from.

    Attributes:
        prompt: that a model answers with this very person, or nearly. complete: says all of it.
        picture: of the world. mask: white where the head is.
    """

    prompt: str
    complete: str
    picture: Image.Image
    mask: Image.Image


def character(profession: str) -> Character:
    """The person whose look prevails in a profession. Raises ValueError for an unknown profession."""
    if profession not in PROFESSIONS:
        raise ValueError(f"there is no profession {profession!r}; there are {', '.join(PROFESSIONS)}")
    look = ordinary(profession)
    images, words = real_people()
    mask = Image.new("L", (SIZE, SIZE), 0)
    mask.paste(255, HEAD)
    return Character(sentence(profession), sentence(profession, *look), images[words.index((profession, *look))], mask)


def attribute_of(word: str) -> str:
    """The attribute of which a word is a value. Raises ValueError for a word that is none."""
    for attribute, values in ATTRIBUTES.items():
        if word in values:
            return attribute
    known = ", ".join(value for values in ATTRIBUTES.values() for value in values)
    raise ValueError(f"there is no class {word!r}; there are {known}")


def _other(values: Sequence[str], value: str) -> str:
    return next(other for other in reversed(values) if other != value)


def _head(attribute: str) -> Loader:
    """The classifier as a reader of one attribute."""

    def load(device: str, classes: Classes) -> Extractor:
        judge = load_classifier(device, name=READER)
        return _extractor(attribute, judge.features, lambda images: judge.logits(list(images), attribute), ATTRIBUTES[attribute])

    return load


def _joint(name: str, attributes: Sequence[str], words: Sequence[str]) -> Loader:
    """The classifier as a reader of several attributes at once: the logits of a combination are the sums of its parts."""

    def load(device: str, classes: Classes) -> Extractor:
        judge = load_classifier(device, name=READER)

        def logits(images: Sequence[Image.Image]) -> Tensor:
            scores = dict(zip(ATTRIBUTES, judge(list(images)), strict=True))
            parts = [scores[attribute].log_softmax(-1) for attribute in attributes]
            return functools.reduce(lambda a, b: (a[:, :, None] + b[:, None]).flatten(1), parts)

        return _extractor(name, judge.features, logits, words)

    return load


def _extractor(name: str, features: Callable, logits: Callable, words: Sequence[str]) -> Extractor:
    return Extractor(reader_of(name), batched(features), batched(logits), tuple(words))


def reader_of(name: str) -> str:
    """The extractor that reads an attribute, all looks or everything."""
    return READER if name == "profession" else f"people-{name}"


READERS: dict[str, Loader] = {
    **{reader_of(attribute): _head(attribute) for attribute in ATTRIBUTES},
    "people-look": _joint("look", ("gender", "tone", "style"), [", ".join(look) for look in LOOKS]),
    "people-everything": _joint("everything", tuple(ATTRIBUTES), EVERYTHING),
}
"""Name -> who reads professions, genders, tones, styles, looks (all three), or all four as a sentence."""


def real_people() -> tuple[list[Image.Image], list[tuple[str, ...]]]:
    """Every picture of the world once, and the words of its attributes."""
    people = all_people()
    pixels = (people.images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(picture) for picture in pixels], [values_of(labels) for labels in people.labels]
