"""The file of a reference bank: what an asset's tokens were in every block and active step, as safetensors.

One tensor ``[branches, tokens, channels]`` for each block of each step, named ``step/block``. What it was recorded from is in the
file's metadata, as JSON under ``about``, with the ``format`` and a ``checksum`` of all else.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 2
BRANCHES = ("unconditional", "conditional")
_PAGE = 4096
_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.bool: "BOOL"}
AGAIN = "record it again with negengine.record_bank"


@dataclass(frozen=True)
class RecordedStep:
    """A step: its timestep (of 1000), and the picture's signal, noise and clean scale as the denoiser was given it."""

    timestep: float
    signal: float
    noise: float
    clean: float


@dataclass(frozen=True)
class RecordedInput:
    """What the denoiser was told besides sample, timestep and prompt: a checksum for each branch; none if steps differ in it."""

    name: str
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class About:
    """What a bank was recorded from.

    Attributes:
        family, denoiser, config, weights: the model: its family, its class, and checksums of its config and its parameters.
        dtype: that the denoiser computed in.
        adapters: those that acted, with their scales. numbers: checksum of its modules' attributes.
        pictures: checksum of each picture with its mask. masked: whether any has a mask. seed: of their noise.
        scheduler: its class. steps: those that were active.
        size: height and width of the latents.
        blocks: those that were selected; min_grid: of these, those with a coarser grid were left out.
        matching: ``"paper"`` needs the masked tokens only, ``"release"`` all.
        branches: of classifier-free guidance, in the order of the tensors' rows.
        prompt, negative_prompt: as they were given. conditioning, negative_conditioning: checksums of what they became; the latter
            is empty without guidance.
        inputs: all else that the denoiser was told. Where branches are calls, it is that of the conditional one.
    """

    family: str
    denoiser: str
    config: str
    weights: str
    dtype: str
    adapters: str
    numbers: str
    pictures: tuple[str, ...]
    masked: bool
    seed: int
    scheduler: str
    steps: tuple[RecordedStep, ...]
    size: tuple[int, int]
    blocks: tuple[str, ...]
    min_grid: int
    matching: str
    branches: tuple[str, ...]
    prompt: str
    negative_prompt: str | None
    conditioning: str
    negative_conditioning: str
    inputs: tuple[RecordedInput, ...]

    def written(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def read(cls, text: str) -> About:
        """Raises AttributeError, TypeError, ValueError, KeyError: no such record."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(text).items()}
        fields["steps"] = tuple(RecordedStep(**step) for step in fields["steps"])
        fields["inputs"] = tuple(RecordedInput(told["name"], tuple(told["checksums"])) for told in fields["inputs"])
        return cls(**fields)


class Writer:
    """Writes a bank while it is recorded, of which memory need not hold more than one block. It appears when it is whole."""

    def __init__(self, path: Path, branches: int, tensors: int) -> None:
        """``tensors``: at most as many will be put."""
        self.path, self.branches = path, branches
        self._start = _pages(2**17 + 512 * tensors)  # the header, which is padded with blanks as safetensors allows
        self._end = 0
        self._entries: dict[str, dict[str, Any]] = {}
        self._missing: dict[str, set[int]] = {}
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        self._part, self._file = Path(name), os.fdopen(descriptor, "wb+")

    def put(self, name: str, rows: Tensor, branch: int | None = None) -> None:
        """Rows ``[tokens, channels]`` of one branch of a tensor, or a tensor as it is."""
        if name not in self._entries:
            shape = [*rows.shape] if branch is None else [self.branches, *rows.shape]
            begin, self._end = self._end, self._end + rows.nbytes * (1 if branch is None else self.branches)
            self._entries[name] = {"dtype": _NAMES[rows.dtype], "shape": shape, "data_offsets": [begin, self._end]}
            self._missing[name] = set() if branch is None else set(range(self.branches))
        self._missing[name].discard(branch or 0)
        self._file.seek(self._start + self._entries[name]["data_offsets"][0] + rows.nbytes * (branch or 0))
        self._file.write(_bytes(rows))

    @property
    def whole(self) -> set[str]:
        """Tensors of which every branch was put."""
        return {name for name, missing in self._missing.items() if not missing}

    def finish(self, about: About) -> None:
        written = about.written()
        self._file.flush()
        self._file.seek(self._start)
        digest = _checksum(written, self._entries, self._file)
        metadata = {"format": str(FORMAT), "about": written, "checksum": digest}
        header = json.dumps({"__metadata__": metadata, **self._entries}).encode()
        room = self._start - 8
        if len(header) > room:
            raise RuntimeError(f"the header of {self.path} takes {len(header)} bytes, {room} were set aside")
        self._file.seek(0)
        self._file.write(room.to_bytes(8, "little") + header.ljust(room))
        self._file.close()
        os.replace(self._part, self.path)

    def abandon(self) -> None:
        """Leave nothing behind, unless it is finished."""
        self._file.close()
        self._part.unlink(missing_ok=True)


@dataclass(frozen=True)
class State:
    """Of a file: what changes when it is overwritten or replaced."""

    size: int
    changed: int
    inode: int


def read(path: Path) -> tuple[About, State]:
    """What a bank was recorded from, after a look at the whole file (once, as long as it does not change).

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged, truncated, newer, or no bank; says what would work.
    """
    state = _state(path)
    if state is None:
        raise FileNotFoundError(f"there is no reference bank {path}; negengine.record_bank records one")
    if not path.is_file():
        raise ValueError(f"a reference bank is a file, and {path} is none")
    return _read(path, state), state


def check_unchanged(path: Path, state: State) -> None:
    """Raises ValueError: the file is no longer as it was when it was read."""
    now = _state(path)
    if now == state:
        return
    how = "is gone" if now is None else "was replaced by another file" if now.inode != state.inode else "was overwritten in place"
    raise ValueError(
        f"the reference bank {path} {how} after ReferenceBank(...) had compared it with its checksum; make a new ReferenceBank and "
        "apply it"
    )


def _state(path: Path) -> State | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return State(found.st_size, found.st_mtime_ns, found.st_ino)


@functools.lru_cache(256)
def _read(path: Path, state: State) -> About:
    size = state.size
    with path.open("rb") as file:
        entries = _header(path, file, size)
        metadata = entries.pop("__metadata__", None)
        if not isinstance(metadata, dict) or not {"format", "about", "checksum"} <= set(metadata):
            raise ValueError(f"{path} holds tensors but is no reference bank; negengine.record_bank records one")
        if metadata["format"] != str(FORMAT):
            raise ValueError(
                f"the reference bank {path} has format {metadata['format']}, and this version of negengine reads format {FORMAT}; "
                f"use the version that wrote it, or {AGAIN}"
            )
        try:
            ends = [operator.index(entry["data_offsets"][1]) for entry in entries.values()]
            about = About.read(metadata["about"])
        except (AttributeError, TypeError, ValueError, LookupError) as error:
            raise _damaged(path, f"its header does not make sense ({error})") from error
        there = size - file.tell()
        if there < max(ends, default=0):
            raise ValueError(f"the reference bank {path} is truncated: {there} of {max(ends)} bytes are there; {AGAIN}")
        if _checksum(metadata["about"], entries, file) != metadata["checksum"]:
            raise _damaged(path, "its checksum differs")
    return about


def _header(path: Path, file: Any, size: int) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length + 8 > size:
        raise ValueError(f"{path} is no safetensors file, or is truncated within its header; {AGAIN}")
    try:
        entries = json.loads(file.read(length))
    except ValueError as error:
        raise _damaged(path, f"its header cannot be read ({error})") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is no mapping")
    return entries


def _damaged(path: Path, how: str) -> ValueError:
    return ValueError(f"the reference bank {path} is damaged: {how}; {AGAIN}, or copy it again")


def _checksum(about: str, entries: dict[str, Any], file: Any) -> str:
    digest = hashlib.sha256(about.encode() + json.dumps(entries, sort_keys=True).encode())
    while piece := file.read(2**22):
        digest.update(piece)
    return digest.hexdigest()


def checksum(*tensors: Tensor) -> str:
    """Of the bytes of tensors, wherever they lie."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.stride(0) != 1:  # a single value that was expanded counts as contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes()


def _pages(count: int) -> int:
    return -(-count // _PAGE) * _PAGE
