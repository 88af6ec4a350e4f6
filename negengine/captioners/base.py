"""What a captioner is, how it is asked, and what is said when it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

Captioner = Callable[[Image.Image], str]


class CaptionError(RuntimeError):
    """A captioner failed on a negative image. What was drawn is kept here; the captioner's own error is the ``__cause__``.

    Attributes:
        reason: what happened.
        prompt: of the image.
        seed: of the image.
        image: that was to be captioned.
        path: where it has been written; None if nowhere.
    """

    def __init__(self, reason: str, prompt: str, seed: int, image: Image.Image, path: Path | None = None) -> None:
        super().__init__(reason, prompt, seed, image, path)
        self.reason, self.prompt, self.seed, self.image, self.path = reason, prompt, seed, image, path

    def __str__(self) -> str:
        where = f"it is in {self.path}" if self.path else "it is this error's .image"
        return f"no caption for the negative image of {self.prompt!r}, seed {self.seed}: {self.reason}; {where}"


def ask(captioner: Captioner, image: Image.Image) -> str:
    """The caption of a picture, on one line.

    Raises:
        ValueError: the captioner returned no text. And whatever it raises.
    """
    caption: Any = captioner(image.convert("RGB"))
    if not isinstance(caption, str):
        raise ValueError(f"the captioner returned {type(caption).__name__}, not a text")
    caption = " ".join(caption.split())
    if not caption:
        raise ValueError("the captioner returned an empty text")
    return caption


def identity(captioner: Captioner) -> str | None:
    """What tells a captioner from others; None for one that has no name, such as a lambda."""
    given = getattr(captioner, "identity", None)
    if given is not None:
        return str(given)
    name = getattr(captioner, "__qualname__", "<")
    return None if "<" in name else f"{captioner.__module__}.{name}"
