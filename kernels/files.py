"""What is remembered between processes: JSON files in the user's cache folder that several processes read and write at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """``negengine`` in ``XDG_CACHE_HOME``, or else in ``~/.cache``.

    Raises:
        RuntimeError: this user has no home.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "negengine"


def fingerprint_of(sources: Iterable[Path]) -> str:
    """Of the names and contents of files."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class JsonFile:
    """A JSON object in one file.

    A reader sees a whole file, old or new; a writer holds a lock while it changes what is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, damaged: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """What the file holds; nothing if there is none, and nothing, after a call of ``damaged``, if it holds no JSON object."""
        try:
            entries = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (UnicodeDecodeError, json.JSONDecodeError):
            entries = None
        if isinstance(entries, dict):
            return entries
        damaged()
        return {}

    def change(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Let ``change`` alter what the file holds, and write that; makes the folder where there is none.

        Raises:
            OSError: the file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.with_suffix(".lock")):
            entries = self.read()
            change(entries)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(entries, file, indent=1, sort_keys=True)
                os.replace(name, self.path)
            except BaseException:
                os.unlink(name)
                raise


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock that the file at ``path`` stands for.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is false.
    """
    import fcntl  # where there is Triton, there is this

    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has the file open, too
