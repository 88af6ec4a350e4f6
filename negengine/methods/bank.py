"""A recorded asset as NegToMe's reference."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from negengine import bank
from negengine.bank import About, State


@dataclass(frozen=True)
class ReferenceBank:
    """An asset whose tokens :func:`negengine.record_bank` has recorded; images are pushed away from them without its picture.

    The whole file is read once to compare it with its checksum. Afterwards it is mapped into memory, and a block's rows are
    read when the block needs them. Calls of the pipeline are refused once the file has changed.

    Args:
        path: of the file. A relative one is meant from the folder in which the process works when this is made.

    Attributes:
        file: its absolute path.
        about: what it was recorded from.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is damaged, truncated, of another format, or no bank.
    """

    path: str | os.PathLike[str]
    about: About = field(init=False, repr=False)
    file: Path = field(init=False, repr=False, compare=False)
    _state: State = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise TypeError(f"path must be the path of a file, got {self.path!r}")
        object.__setattr__(self, "path", os.fspath(self.path))
        object.__setattr__(self, "file", Path(self.path).absolute())  # not resolved: a link may be turned to another file
        about, state = bank.read(self.file)
        object.__setattr__(self, "about", about)
        object.__setattr__(self, "_state", state)

    def check_unchanged(self) -> None:
        """Raises ValueError: the file is no longer as it was when this was made."""
        bank.check_unchanged(self.file, self._state)
