"""What is known of the embedded models, so that the protocols need no flag for them: prompts, classes, who reads, real images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from negengine.metrics.extractors import Classes, Extractor, Loader, batched


@dataclass(frozen=True, eq=False)
class World:
    """What the models of one data set have in common.

    Attributes:
        prompts: one for each class. open_prompt: leaves the class open.
        reader: the name of the extractor that sees and reads their pictures.
        words: class -> how a prompt says it, in the order of the reader's classes.
        real: real images that the models never saw, and the number of their classes.
        captioner: says what a picture shows, as a prompt.
    """

    prompts: tuple[str, ...]
    open_prompt: str
    reader: str
    words: tuple[str, ...]
    real: Callable[[], tuple[list[Image.Image], list[int]]]
    captioner: Callable[[], Any]

    def prompt_of(self, word: str) -> str:
        """The prompt of a class. Raises ValueError for a class that does not exist."""
        if word not in self.words:
            raise ValueError(f"there is no class {word!r}; there are {', '.join(self.words)}")
        return self.prompts[self.words.index(word)]


def world_of(model: str | None) -> World | None:
    """Of an embedded model; None for others."""
    return _digits() if model in ("mnist-flux", "mnist-sdxl") else None


def digits(device: str, classes: Classes) -> Extractor:
    """The classifier that judges ``mnist-flux`` and ``mnist-sdxl``: it reads ten digits from 32 x 32 pixels."""
    from negengine.models import load_classifier
    from negengine.models.prompts import WORDS

    judge = load_classifier(device)
    return Extractor("mnist-classifier", batched(judge.features), batched(judge.logits), WORDS)


EMBEDDED: Mapping[str, Loader] = {"mnist-classifier": digits}


def _digits() -> World:
    from negengine.models.prompts import PROMPTS, WORDS

    return World(PROMPTS, "a digit", "mnist-classifier", WORDS, _real_digits, _digit_captioner)


def _real_digits() -> tuple[list[Image.Image], list[int]]:
    from negengine.models import heldout_digits

    images, labels = heldout_digits()
    pixels = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return [Image.fromarray(picture) for picture in pixels], labels.tolist()


def _digit_captioner() -> Any:
    from negengine.models.captioner import DigitCaptioner

    return DigitCaptioner()
