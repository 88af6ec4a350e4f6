"""Text files that users write: lines and JSON, with the file's name in every error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """A file in UTF-8. Raises ValueError for another encoding, OSError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")  # a spreadsheet's UTF-8 begins with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8, the encoding that is read; save it anew as UTF-8") from error


def read_lines(path: Path) -> list[str]:
    """The lines that are not empty. Raises ValueError if there is none, and as :func:`read_text`."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no line")
    return lines


def read_json(path: Path) -> Any:
    """Raises ValueError for what does not parse or an object with a key twice, and as :func:`read_text`."""
    text = read_text(path)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise _Twice(f"{path} has {next(key for key in keys if keys.count(key) > 1)} twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except _Twice:
        raise
    except ValueError as error:
        raise ValueError(f"{path} does not parse: {error}") from error


class _Twice(ValueError):
    """A key stands twice in an object."""
