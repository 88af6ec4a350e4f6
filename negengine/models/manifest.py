"""What a checkpoint folder must contain: sizes and checksums of its files, in ``manifest.json``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

FILE = "manifest.json"
ABOUT = ("README.md", "fidelity.json", FILE)
"""Files about the checkpoint, which may change without it."""


class DamagedCheckpoint(RuntimeError):
    """A file of an embedded checkpoint is missing or is not the one that was trained."""

    def __init__(self, file: Path, trouble: str) -> None:
        super().__init__(f"{file} {trouble}; install negengine again, or run `make train` to train the models anew")


def write(folder: Path) -> None:
    """Record every file of the folder, apart from ``ABOUT``."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in ABOUT)
    entries = {file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    (folder / FILE).write_text(json.dumps(entries, indent=2) + "\n")


def verify(folder: Path) -> None:
    """Compare the folder with its manifest.

    Raises:
        DamagedCheckpoint: names the first file that is missing, truncated or altered, or the manifest itself.
    """
    manifest = folder / FILE
    if not manifest.is_file():
        raise DamagedCheckpoint(manifest, "is missing")
    try:
        expected = [
            (folder / name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in json.loads(manifest.read_text()).items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(manifest, f"cannot be read ({error})") from error
    for file, size, checksum in expected:
        if not file.is_file():
            raise DamagedCheckpoint(file, "is missing")
        if file.stat().st_size != size:
            raise DamagedCheckpoint(file, f"has {file.stat().st_size} bytes instead of {size}")
        if _sha256(file) != checksum:
            raise DamagedCheckpoint(file, "is not the file that was trained (its checksum differs)")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
