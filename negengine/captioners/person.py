"""A person captions, at the terminal: DNP as its authors did it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

QUESTION = "What does this picture show? A few plain words: "


@dataclass(frozen=True)
class Person:
    """Writes the picture to a file, prints its path and asks what the picture shows.

    Args:
        folder: for the pictures; a temporary one if None.
        ask: shows a question and returns the answer, as ``input`` does. None: the terminal. In a notebook give
            ``ask=input``, which opens a field there.

    Raises:
        RuntimeError: nobody can answer, because the standard input is no terminal.
    """

    folder: Path | None = None
    ask: Callable[[str], str] | None = None
    identity = "person"

    def __post_init__(self) -> None:
        if self.ask is None and not (sys.stdin and sys.stdin.isatty()):
            raise RuntimeError(
                "a person's caption is typed at a terminal, and the standard input is none; give another captioner, "
                "or Person(ask=...) with a function that puts the question elsewhere"
            )

    def __call__(self, image: Image.Image) -> str:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix="negative-", suffix=".png", dir=self.folder, delete=False) as file:
            image.save(file, "png")
        return (self.ask or input)(f"{file.name}\n{QUESTION}")
