"""Verdicts on the Triton kernels: what was found out about them on this device, where that is kept, and what follows for a call.

A verdict holds for one :class:`Key`. :mod:`negengine.ops.establish` makes verdicts; operators only look them up here, from memory
after the first time, without a lock, also while a graph is traced or captured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from negengine.kernels import call as call_module
from negengine.kernels.call import Call
from negengine.kernels.files import JsonFile, cache_folder, fingerprint_of
from negengine.ops import registry

logger = logging.getLogger("negengine")

VARIABLE = "NEGENGINE_VERIFY"
MODES = ("auto", "off", "trust", "force")
VERSION = 1  # of the file
SHIPPED = Path(__file__).with_name("proven.json")
ANY_DRIVER = "any"

GAIN = 0.95  # the kernels are faster where they take at most this share of the fallback's time
AGREEMENT = 0.8  # in at least this share of the rounds
QUIET = 0.05  # the noise below which "not faster" is believed without such an agreement
REACH = 4.0  # how far a measurement carries, in doublings of the sizes together
WEIGHTS = (1, 1, 1, 4)  # of B, T, M, D: channels decide how much of the time is multiplication

UNPROVEN = "they have not proved themselves on this device yet; `negengine verify` lets them"
UNMEASURED = "their speed near this shape has not been measured; `negengine verify --shape` does that"
Sizes = tuple[int, int, int, int]  # B, T, M, D


def verify_mode(given: str | None = None) -> str:
    """``given``, or else the value of ``NEGENGINE_VERIFY``, or else ``"auto"``.

    Raises:
        ValueError: not one of ``MODES``.
    """
    name, value = ("mode", given) if given is not None else (VARIABLE, os.environ.get(VARIABLE) or "auto")
    if value not in MODES:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, MODES))}, got {value!r}")
    return value


# --- what a verdict is about -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """What a verdict holds for; on anything else it says nothing.

    Attributes:
        kernels: fingerprint of the kernels, of the fallback that they were timed against, and of the proof itself.
    """

    device: str
    architecture: str
    processors: int
    driver: str
    torch: str
    triton: str
    kernels: str
    dtype: str
    search: str
    matching: str

    @property
    def text(self) -> str:
        return " | ".join(str(value) for value in dataclasses.astuple(self))

    def changed(self, old: Mapping[str, Any]) -> list[str]:
        """What differs from another key of the same device and call; nothing if it is of others."""
        now = dataclasses.asdict(self)
        differing = [name for name, value in now.items() if old.get(name) != value]
        return [] if {"device", "dtype", "search", "matching"} & set(differing) else differing


@dataclass(frozen=True)
class Subject:
    """What a process can ask about: cheaper to make than a :class:`Key`, which names the device and all versions."""

    device: torch.device
    dtype: torch.dtype
    search: str
    matching: str

    @property
    def key(self) -> Key:
        from negengine.kernels.triton import launch

        architecture = launch.architecture(self.device)
        name = architecture.name
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            name = properties.gcnArchName if torch.version.hip else f"{properties.major}.{properties.minor}"
        return Key(
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "Triton's interpreter",
            architecture=name,
            processors=architecture.processors,
            driver=driver(),
            torch=str(torch.__version__),
            triton=launch.triton.__version__,
            kernels=fingerprint(),
            dtype=str(self.dtype).removeprefix("torch."),
            search=self.search,
            matching=self.matching,
        )


@functools.cache
def driver() -> str:
    """Version of the GPU's driver; of the operating system's kernel where the driver comes with that."""
    for module in ("nvidia", "amdgpu"):
        with contextlib.suppress(OSError):
            return Path("/sys/module", module, "version").read_text().strip()
    return platform.release()


@functools.cache
def fingerprint() -> str:
    """Of all sources that a verdict rests on: kernels, their backends, the proof itself.

    Those of guidance have a check of their own; what is the same for every backend, checks and registration, is left out.
    """
    folder, here = Path(call_module.__file__).parent, Path(__file__).parent
    sources = [folder / "call.py", *sorted(folder.glob("triton/*.py")), *sorted(folder.glob("eager/*.py"))]
    sources = [source for source in sources if not source.stem.startswith("guidance")]
    sources += [here / name for name in ("triton.py", "eager.py", "prove.py")]
    return fingerprint_of(sources)


# --- the verdict -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Times of one shape ``(B, T, M, D)``, medians of the rounds in milliseconds."""

    shape: Sizes
    kernels_ms: float
    fallback_ms: float
    faster: bool

    @classmethod
    def judged(cls, shape: Sizes, kernels: Sequence[float], fallback: Sequence[float]) -> Speed | None:
        """The times of the same rounds; None where something disturbed them so much that they decide nothing.

        Each round is its own comparison, so that a device whose speed drifts treats both alike.
        """
        ratios = sorted(ours / theirs for ours, theirs in zip(kernels, fallback, strict=True))
        won = sum(ratio <= GAIN for ratio in ratios) / len(ratios)
        low, middle, high = statistics.quantiles(ratios, n=4)
        faster = won >= AGREEMENT
        if not faster and won > 1 - AGREEMENT and (high - low) / middle >= QUIET:
            return None
        return cls(shape, statistics.median(kernels), statistics.median(fallback), faster)

    def distance(self, shape: Sizes) -> float:
        """How far another shape is, in weighted doublings."""
        return sum(weight * abs(math.log2(a / b)) for weight, a, b in zip(WEIGHTS, self.shape, shape, strict=True))

    def __str__(self) -> str:
        B, T, M, D = self.shape
        times = f"{self.kernels_ms:.3f} ms, fallback {self.fallback_ms:.3f} ms"
        return f"{'faster' if self.faster else 'not faster'} at B={B} T={T} M={M} D={D} ({times})"


@dataclass(frozen=True)
class Verdict:
    """What was found out about the Triton kernels on a device.

    Attributes:
        right: whether every case agreed with the float64 oracle; None: not found out.
        reason: what went wrong, or why nothing was found out.
        cases: how many cases were tried.
        when: seconds since 1970.
        speeds: the shapes whose timings decided something.
        again: whether this process should ask again, as another one is finding out just now.
    """

    right: bool | None
    reason: str = ""
    cases: int = 0
    when: float = field(default_factory=time.time)
    speeds: tuple[Speed, ...] = ()
    again: bool = False
    _answers: dict[Sizes, str | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def kind(self) -> str:
        """``"proven"`` (right, and faster at some shape), ``"slower"``, ``"wrong"`` or ``"unknown"``."""
        if self.right is None or (self.right and not self.speeds):
            return "unknown"
        if not self.right:
            return "wrong"
        return "proven" if any(speed.faster for speed in self.speeds) else "slower"

    def against(self, shape: Sizes) -> str | None:
        """Why the kernels should not be chosen by themselves for a call of these sizes, ``(B, T, M, D)``; None if they should.

        That they are right holds for every shape, their speed for the shapes near a measured one. Of symbolic sizes nothing is
        known: the kernels must then be faster wherever they were measured.
        """
        if self.kind in ("wrong", "unknown"):
            return f"verdict on this device: {self.kind}: {self.reason}"
        if not all(type(size) is int for size in shape):
            slow = next((speed for speed in self.speeds if not speed.faster), None)
            return None if slow is None else f"verdict on this device: {slow}, and this call has symbolic sizes"
        if shape not in self._answers:
            nearest = self.near(shape)
            self._answers[shape] = (
                UNMEASURED if nearest is None else None if nearest.faster else f"verdict on this device: {nearest}"
            )
        return self._answers[shape]

    def near(self, shape: Sizes) -> Speed | None:
        """The nearest measured shape, if it is within ``REACH``; an empty call is like one of ones."""
        shape = tuple(max(size, 1) for size in shape)  # type: ignore[assignment]
        nearest = min(self.speeds, key=lambda speed: speed.distance(shape), default=None)
        return nearest if nearest is not None and nearest.distance(shape) <= REACH else None

    @property
    def age(self) -> str:
        seconds = max(time.time() - self.when, 0)
        for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
            if seconds >= length:
                count = int(seconds // length)
                return f"{count} {unit}{'s' * (count > 1)} ago"
        return "just now"

    def __str__(self) -> str:
        if self.kind in ("wrong", "unknown"):
            return f"{self.kind} ({self.reason})"
        return f"{self.kind} ({self.cases} cases agree with the float64 oracle; {'; '.join(map(str, self.speeds))}), {self.age}"

    def to_json(self) -> dict[str, Any]:
        speeds = [dataclasses.asdict(speed) for speed in self.speeds]
        return {"right": self.right, "reason": self.reason, "cases": self.cases, "when": self.when, "speeds": speeds}

    @classmethod
    def from_json(cls, entry: Any) -> Verdict | None:
        """The inverse of :meth:`to_json`; None for anything else."""
        try:
            speeds = tuple(
                Speed(sizes_of(s["shape"]), float(s["kernels_ms"]), float(s["fallback_ms"]), _bool(s["faster"]))
                for s in entry["speeds"]
            )
            return cls(_bool(entry["right"]), str(entry["reason"]), int(entry["cases"]), float(entry["when"]), speeds)
        except (KeyError, TypeError, ValueError):
            return None


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r}")
    return value


def sizes_of(values: Sequence[int]) -> Sizes:
    """``values`` as a shape.

    Raises:
        ValueError: they are not four positive whole numbers.
    """
    if len(values) != 4 or not all(type(size) is int and size > 0 for size in values):
        raise ValueError(f"a shape is four positive whole numbers B, T, M, D, got {list(values)}")
    return tuple(values)  # type: ignore[return-value]


# --- where verdicts are kept -------------------------------------------------------------------------------------


class Store:
    """Verdicts in a JSON file: ``{"version": 1, "verdicts": {key: {"key": ..., "verdict": ...}}}``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = JsonFile(path)

    def get(self, key: Key) -> Verdict | None:
        entry = self._entries().get(key.text)
        return Verdict.from_json(entry.get("verdict")) if isinstance(entry, dict) else None

    def put(self, key: Key, verdict: Verdict) -> None:
        """Keep a verdict that says something.

        Raises:
            OSError: the file cannot be written.
        """

        def add(entries: dict[str, Any]) -> None:
            if entries.get("version") != VERSION or not isinstance(entries.get("verdicts"), dict):
                entries.clear()
                entries.update(version=VERSION, verdicts={})
            entries["verdicts"][key.text] = {"key": dataclasses.asdict(key), "verdict": verdict.to_json()}

        self._file.change(add)

    def changed(self, key: Key) -> list[str]:
        """What differs from the latest verdict of the same device and call; nothing where there is none."""
        olds = [e for e in self._entries().values() if isinstance(e, dict) and isinstance(e.get("key"), dict)]
        verdicts = [(verdict.when, key.changed(e["key"])) for e in olds if (verdict := Verdict.from_json(e.get("verdict")))]
        return max((entry for entry in verdicts if entry[1]), default=(0.0, []))[1]

    def _entries(self) -> dict[str, Any]:
        try:
            content = self._file.read(lambda: _once(f"{self.path} is damaged and is not used; the next verdict replaces it"))
        except OSError as error:
            _once(f"the verdicts in {self.path} cannot be read: {error}")
            return {}
        if content and content.get("version") != VERSION:
            _once(f"{self.path} is of another version of negengine and is not used; the next verdict replaces it")
            return {}
        entries = content.get("verdicts")
        return entries if isinstance(entries, dict) else {}


def store() -> Store | None:
    """The user's own verdicts; None where this user has no home."""
    try:
        return Store(cache_folder() / "verdicts.json")
    except RuntimeError:
        return None


_said: set[str] = set()


def _once(text: str) -> None:
    """Warn of a thing once per process."""
    if text not in _said:
        _said.add(text)
        logger.warning("negengine: %s", text)


# --- what this process knows -------------------------------------------------------------------------------------

_known: dict[Subject, Verdict | None] = {}  # entries are set whole, so readers need no lock, and a fork copies none


class _Pinned(threading.local):
    view: dict[Subject, Verdict | None] | None = None


_pinned = _Pinned()


def pin() -> None:
    """From here on this thread sees no verdict change, until :func:`unpin`: the backend stays the same within a pipeline call."""
    _pinned.view = dict(_known)
    registry.changed()


def unpin() -> None:
    _pinned.view = None
    registry.changed()


def view() -> int | None:
    """Which verdicts this thread sees: a name of what it has pinned."""
    return None if _pinned.view is None else id(_pinned.view)


def find(subject: Subject) -> Verdict | None:
    """What is known of a subject; the first time in a process it is looked up on disk."""
    view = _known if _pinned.view is None else _pinned.view
    if subject not in view:
        if subject not in _known:
            _known[subject] = look_up(subject.key)
        view[subject] = _known[subject]
    return view[subject]


def look_up(key: Key) -> Verdict | None:
    """A verdict of the user's own, or else one that came with the package, which holds for any driver."""
    own = store()
    verdict = None if own is None else own.get(key)
    return verdict or Store(SHIPPED).get(dataclasses.replace(key, driver=ANY_DRIVER))


def remember(subject: Subject, verdict: Verdict) -> None:
    """Let this process know a verdict."""
    _known[subject] = verdict
    registry.changed()


def learn(subject: Subject, key: Key, verdict: Verdict) -> None:
    """Remember a verdict, and keep it on disk if it says something."""
    remember(subject, verdict)
    if verdict.kind == "unknown":
        return
    own = store()
    try:
        if own is None:
            raise OSError("this user has no home folder")
        own.put(key, verdict)
    except (OSError, ImportError) as error:
        _once(f"the verdict is known to this process only: it cannot be kept ({error})")


def forget() -> None:
    """Forget what this process knows and has said; files stay."""
    _known.clear()
    _said.clear()
    unpin()


def subject_of(call: Call) -> Subject:
    return Subject(call.x.device, call.x.dtype, call.search, call.matching)


def defers(call: Call) -> str | None:
    """Why the Triton kernels should not be chosen by themselves for a call; None if they should.

    Raises:
        ValueError: ``NEGENGINE_VERIFY`` has an unknown value.
    """
    if call.x.device.type != "cuda":
        return "on CPUs it is Triton's interpreter, which is for tests"
    mode = verify_mode()
    if mode == "trust":
        return None
    if mode == "off":
        return f"{VARIABLE}=off"
    subject = subject_of(call)
    verdict = find(subject)
    if verdict is None:
        _once(f"the Triton kernels are not used on {_about(subject)}: {UNPROVEN}")
        return UNPROVEN
    if verdict.kind == "wrong":
        _once(f"the Triton kernels are not used on {_about(subject)}: they were found wrong ({verdict.reason})")
    B, T, D = call.x.shape
    M = call.bank.shape[1]
    reason = verdict.against((B, T, M, D))
    if reason is UNMEASURED:
        _once(f"the Triton kernels are not used at B={B} T={T} M={M} D={D} on {_about(subject)}: {UNMEASURED}")
    return reason


def warn_if_wrong(call: Call) -> None:
    """For a caller who names the kernels: one warning per process if they were found wrong on this device."""
    if call.x.device.type != "cuda" or verify_mode() == "trust":
        return
    verdict = find(subject_of(call))
    if verdict is not None and verdict.kind == "wrong":
        _once(
            f"backend='triton' runs because it was asked for, but on {_about(subject_of(call))} the Triton kernels were found "
            f"wrong ({verdict.reason}); `negengine verify --force` tries them again"
        )


def _about(subject: Subject) -> str:
    name = torch.cuda.get_device_name(subject.device) if subject.device.type == "cuda" else "Triton's interpreter"
    return f"{name} in {str(subject.dtype).removeprefix('torch.')}"
