"""Captions that were given once, on the disk: a run that is repeated or goes on neither draws nor asks again."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


class CaptionCache:
    """A folder with a JSON file per caption, and beside it the picture that was captioned.

    Files appear whole or not at all, and several processes may share the folder.

    Args:
        folder: made when the first caption is kept.
        model: tells the model that draws from others. None: where its pipeline was loaded from; but that says nothing of
            adapters (LoRA) or weights that were changed since, so name the model where there are any.
    """

    def __init__(self, folder: str | os.PathLike[str], model: str | None = None) -> None:
        self.folder, self.model = Path(folder), model

    def find(self, facts: Mapping[str, Any]) -> tuple[str, Image.Image] | None:
        """The caption kept for ``facts``, and its picture; None if there is none.

        Raises:
            ValueError: a file is damaged; names it.
        """
        path = self._path(facts)
        if not path.exists():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            caption = kept["caption"]
            if kept["facts"] != fingerprint(facts) or not isinstance(caption, str) or not caption.strip():
                raise ValueError("it does not hold what its name says")
        except (ValueError, KeyError, TypeError) as error:  # of which JSON's and Unicode's errors are some
            raise ValueError(f"{path} is damaged ({error}); remove it to draw and caption anew") from error
        picture = path.with_suffix(".png")
        try:
            with Image.open(picture) as image:
                return caption, image.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{picture} is damaged or missing ({error}); remove {path} to draw and caption anew") from error

    def keep(self, facts: Mapping[str, Any], caption: str, picture: bytes) -> None:
        """Keep a caption, and the PNG file of its picture."""
        path = self._path(facts)
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(path.with_suffix(".png"), picture)
        text = json.dumps({"caption": caption, "facts": fingerprint(facts)}, indent=1, ensure_ascii=False)
        _write(path, (text + "\n").encode())  # last: it says that the picture is there

    def _path(self, facts: Mapping[str, Any]) -> Path:
        text = json.dumps(fingerprint(facts), sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def fingerprint(value: Any) -> Any:
    """``value`` as JSON holds it, pictures and tensors by a hash of their content.

    Raises:
        TypeError: it holds something that cannot be told from another of its kind, such as a function.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(name): fingerprint(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [fingerprint(part) for part in value]
    if isinstance(value, Image.Image):
        return _hash("picture", value.mode, value.size, value.tobytes())
    if hasattr(value, "detach"):  # a tensor
        value = value.detach().cpu().double().numpy()
    if hasattr(value, "dtype") and hasattr(value, "tobytes"):
        return _hash("array", value.dtype, value.shape, value.tobytes())
    raise TypeError(f"a caption cannot be kept under {value!r}, which is told apart by nothing; call without a cache")


def _hash(*parts: Any) -> str:
    told = [part if isinstance(part, bytes) else repr(part).encode() for part in parts]
    return f"{parts[0]} {hashlib.sha256(b' '.join(told)).hexdigest()}"


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f".{uuid.uuid4().hex}")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
