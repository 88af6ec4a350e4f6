"""PNG files that carry how their picture was made, and are never written over another."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

METADATA_KEY = "negengine"


def encode(image: Image.Image, told: Mapping[str, Any]) -> bytes:
    """A PNG file with ``told`` as JSON in its text."""
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA_KEY, json.dumps(told))
    file = io.BytesIO()
    image.save(file, "png", pnginfo=info)
    return file.getvalue()


def write(image: Image.Image, path: Path, told: Mapping[str, Any]) -> None:
    """Write a picture and what is told of it. Raises FileExistsError where there is a file already."""
    data = encode(image, told)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)


def read(path: Path) -> dict[str, Any]:
    """What a picture's file tells. Raises ValueError if it tells nothing."""
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get(METADATA_KEY)
    if text is None:
        raise ValueError(f"{path} does not tell how it was made")
    return json.loads(text)


def slug(prompt: str) -> str:
    """A prompt as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "prompt"


def free(path: Path) -> Path:
    """``path``, or the first of its numbered neighbours that does not exist."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found
