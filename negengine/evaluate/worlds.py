"""What is known of the embedded models, so that the protocols need no flag for them: prompts, classes, who reads, real images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from negengine.metrics.extractors import Classes, Extractor, Loader, batched

Real = tuple[list[Image.Image], list[tuple[str, ...]]]


@dataclass(frozen=True)
class Removable:
    """How a class can be removed.

    Attributes:
        prompt: leaves the class open. avoid: names it. reader: tells whether it is there.
        metrics: what is asked of the pictures.
    """

    prompt: str
    avoid: str
    reader: str
    metrics: tuple[str, ...] = ("forbidden", "kl", "fid")


@dataclass(frozen=True, eq=False)
class World:
    """What the models of one data set have in common.

    Attributes:
        prompts: one for each class of the reader.
        reader: the name of the extractor that sees and reads their pictures.
        removable: class -> how it can be removed; raises ValueError for a class that does not exist.
        real: real images, and the words of the classes that each belongs to.
        captioner: says what a picture shows, as a prompt.
        diversity: further metrics of diversity, ``NAME:EXTRACTOR``.
        complete: prompts that say all that can be said, for the protocol ``pairs``; empty: ``prompts``.
        correctness: how far an image shows such a prompt, ``NAME:EXTRACTOR``.
    """

    prompts: tuple[str, ...]
    reader: str
    removable: Callable[[str], Removable]
    real: Callable[[], Real]
    captioner: Callable[[], Any]
    diversity: tuple[str, ...] = ()
    complete: tuple[str, ...] = ()
    correctness: str = "prompt-probability"


def world_of(model: str | None) -> World | None:
    """Of an embedded model; None for others."""
    kinds: Mapping[str, Callable[[], World]] = {"mnist": _digits, "people": _people}
    family, dash, rest = str(model).partition("-")
    return kinds[family]() if dash and family in kinds and rest in ("flux", "sdxl") else None


def digits(device: str, classes: Classes) -> Extractor:
    """The classifier that judges ``mnist-flux`` and ``mnist-sdxl``: it reads ten digits from 32 x 32 pixels."""
    from negengine.models import load_classifier
    from negengine.models.prompts import WORDS

    judge = load_classifier(device)
    return Extractor("mnist-classifier", batched(judge.features), batched(judge.logits), WORDS)


def _reader_of_people(name: str) -> Loader:
    def load(device: str, classes: Classes) -> Extractor:
        from negengine.evaluate.people import READERS

        return READERS[name](device, classes)

    return load


PEOPLE = (
    "people-classifier", "people-gender", "people-tone", "people-style", "people-look", "people-everything",
)  # fmt: skip
EMBEDDED: Mapping[str, Loader] = {"mnist-classifier": digits, **{name: _reader_of_people(name) for name in PEOPLE}}


def _digits() -> World:
    from negengine.models.prompts import PROMPTS

    return World(PROMPTS, "mnist-classifier", _removable_digit, _real_digits, _digit_captioner)


def _removable_digit(word: str) -> Removable:
    from negengine.models.prompts import PROMPTS, WORDS

    if word not in WORDS:
        raise ValueError(f"there is no class {word!r}; there are {', '.join(WORDS)}")
    return Removable("a digit", PROMPTS[WORDS.index(word)], "mnist-classifier")


def _real_digits() -> Real:
    from negengine.models import heldout_digits
    from negengine.models.prompts import WORDS

    images, labels = heldout_digits()
    pixels = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return [Image.fromarray(picture) for picture in pixels], [(WORDS[label],) for label in labels.tolist()]


def _digit_captioner() -> Any:
    from negengine.models.captioner import DigitCaptioner

    return DigitCaptioner()


def _people() -> World:
    from negengine.evaluate import people
    from negengine.models.people.prompts import PROMPTS

    return World(
        PROMPTS,
        people.READER,
        _removable_look,
        people.real_people,
        people.PeopleCaptioner,
        diversity=(*(f"label-entropy:people-{name}" for name in ("gender", "tone", "style")), "distinct:people-look"),
        complete=people.COMPLETE,
        correctness="prompt-probability:people-everything",
    )


def _removable_look(word: str) -> Removable:
    from negengine.evaluate import people

    prompt, avoid = people.open_prompt(word)
    reader = people.reader_of(people.attribute_of(word))
    last = f"as-prompted:{people.READER}" if prompt else "fid"
    return Removable(prompt, avoid, reader, ("forbidden", "kl", last))
