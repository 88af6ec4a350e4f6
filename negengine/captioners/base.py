"""What a captioner is, how it is asked, and what is said when it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

Captioner = Callable[[Image.Image], str]


@dataclass(frozen=True, eq=False)
class NegativeImage:
    """A negative image that has been drawn.

    Attributes:
        prompt, seed: of the image.
        image: itself.
        caption: of the image; None if it has none yet.
        drawn: with what.

    Raises:
        ValueError: a caption that says nothing.
    """

    prompt: str
    seed: int
    image: Image.Image
    caption: str | None
    drawn: Mapping[str, Any] = field(repr=False)

    def __post_init__(self) -> None:
        if self.caption is not None and not (isinstance(self.caption, str) and self.caption.strip()):
            raise ValueError(f"a caption must be a text that says something, got {self.caption!r}")


class CaptionError(RuntimeError):
    """A captioner failed on a negative image. What was drawn is kept here; the captioner's own error is the ``__cause__``.

    Attributes:
        reason: what happened.
        prompt: of the image.
        seed: of the image.
        image: that was to be captioned.
        path: where it has been written; None if nowhere.
        negatives: every negative image of the call, with the captions that were finished. ``negatives=error.negatives`` goes on.
    """

    def __init__(
        self,
        reason: str,
        prompt: str,
        seed: int,
        image: Image.Image,
        path: Path | None = None,
        negatives: Sequence[NegativeImage] = (),
    ) -> None:
        super().__init__(reason, prompt, seed, image, path, negatives)
        self.reason, self.prompt, self.seed, self.image, self.path = reason, prompt, seed, image, path
        self.negatives = tuple(negatives)

    def __str__(self) -> str:
        on = ", and `negatives=error.negatives` in the next call goes on from here" if self.negatives else ""
        where = f"it is in {self.path}" if self.path else f"it is this error's .image{on}"
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
