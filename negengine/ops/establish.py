"""Establishing a verdict: the proof runs in a child process, and its answer is judged here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from negengine.kernels.files import cache_folder, locked
from negengine.ops import prove, registry, verdicts
from negengine.ops.verdicts import Key, Sizes, Speed, Subject, Verdict, verify_mode
from negengine.reference import MATCHINGS

logger = logging.getLogger("negengine")

LIMIT = 120.0  # seconds for the child
# by these a process ends through what it runs; by others through its surroundings
OWN_FAULT = [getattr(signal, name) for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE") if hasattr(signal, name)]
CONSEQUENCES = {
    "proven": "",
    "slower": "; the torch backend is used",
    "wrong": "; the torch backend is used instead, and `negengine verify --force` tries them again",
    "unknown": "; the torch backend is used until the next process asks again",
}
BUSY = "another process is proving the kernels just now"
CHILD = "import sys; from pathlib import Path; from negengine.ops.prove import main; main(Path(sys.argv[1]))"

# what is timed where nothing else is said: (B, T, M, D) of attention in SDXL and FLUX.1, four images of a prompt
SHAPES: tuple[Sizes, ...] = ((4, 1024, 1024, 1280), (4, 4096, 4096, 640), (4, 2304, 2304, 3072), (4, 4096, 4096, 3072))

_forced: set[Subject] = set()  # proven anew in this process, as NEGENGINE_VERIFY=force wants it


def verify(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    search: str = "auto",
    matching: str = "paper",
    shapes: Sequence[Sequence[int]] | None = None,
    mode: str | None = None,
) -> Verdict:
    """Whether the Triton kernels are right and fast on this device; proves it in a child process where that is not known.

    Args:
        device: a GPU; the current one if None.
        dtype, search, matching: of the calls that the verdict is to hold for.
        shapes: ``(B, T, M, D)`` of calls to be timed: images, source tokens, reference tokens, channels. ``SHAPES`` if None.
        mode: ``"auto"`` (proves what is not known), ``"force"`` (proves anew), ``"off"`` or ``"trust"`` (proves nothing); the
            value of ``NEGENGINE_VERIFY`` if None.

    Returns:
        The verdict, which is remembered. Its ``kind`` is ``"proven"``, ``"slower"``, ``"wrong"`` or ``"unknown"``.

    Raises:
        ValueError: an unknown mode, matching, search or a shape that is none.
        RuntimeError: the kernels do not take such calls on this device at all; or a graph is being compiled or captured.
    """
    mode = verify_mode(mode)
    if matching not in MATCHINGS:
        raise ValueError(f"matching must be one of {MATCHINGS}, got {matching!r}")
    sizes = SHAPES if shapes is None else tuple(verdicts.sizes_of(shape) for shape in shapes)
    if matching == "release" and any(T != M for _, T, M, _ in sizes):
        raise ValueError("matching='release' is defined for as many reference as source tokens; give shapes with T == M")
    place = _device(device)
    registry.choose("triton", place, dtype, search)
    if being_recorded():
        raise RuntimeError("nothing can be proven while a graph is compiled or captured; call negengine.ops.verify before that")
    verdicts.unpin()
    subject = Subject(place, dtype, search, matching)
    return _verdict(subject, sizes, mode, exactly=True)


def settle(
    devices: Iterable[torch.device], dtype: torch.dtype, search: str, matching: str, channels: Iterable[int]
) -> list[Verdict]:
    """What ``apply`` and the beginning of a pipeline call do: find or establish a verdict for each GPU.

    No trouble of a proof is an error here: the fallback serves. Does nothing on CPUs and while a graph is compiled or captured.

    Args:
        channels: of the calls to come; of the usual shapes those that have them are timed.
    """
    mode, found, wanted = verify_mode(), [], set(channels)
    gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
    if not gpus:
        return []
    shapes = tuple(shape for shape in SHAPES if shape[3] in wanted) or SHAPES
    if being_recorded():
        mode = "off"
    verdicts.unpin()
    for device in gpus:
        if registry.find("triton", device, dtype, search)[0] is not None:
            found.append(_verdict(Subject(device, dtype, search, matching), shapes, mode))
    return found


def being_recorded() -> bool:
    """Whether a graph is being compiled or captured, in which nothing may wait for another process."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _device(given: torch.device | str | None) -> torch.device:
    device = torch.device(given) if given is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


# --- one verdict -------------------------------------------------------------------------------------------------


def _verdict(subject: Subject, shapes: Sequence[Sizes], mode: str, exactly: bool = False) -> Verdict:
    """The known verdict if it says enough, or else a new one.

    Args:
        exactly: the caller asks for these very shapes, and again where nothing could be found out before. Otherwise measurements
            nearby will do, and a process that could find out nothing does not try again.
    """
    known = verdicts.find(subject)
    if known is None or known.again:
        known = _refreshed(subject, known)
    if mode in ("off", "trust"):
        return known or Verdict(None, f"{verdicts.UNPROVEN}; with mode {mode!r} nothing is proven")
    forced = mode == "force" and (exactly or subject not in _forced)
    if not forced and known is not None and not _missing(known, shapes, exactly):
        return known
    with _alone() as alone:
        if not forced:  # what another process has found out until now
            known = _refreshed(subject, known)
        missing = shapes if known is None or forced else _missing(known, shapes, exactly)
        if known is not None and not missing:
            return known
        key = subject.key
        verdict = _announced(subject, key, missing) if alone else Verdict(None, BUSY, again=True)
        if known is not None and known.right:
            if verdict.kind == "unknown" and not forced:
                return known  # which stays true
            if verdict.right:
                fresh = {speed.shape for speed in verdict.speeds}
                older = (speed for speed in known.speeds if speed.shape not in fresh)
                verdict = dataclasses.replace(verdict, speeds=(*verdict.speeds, *older))
        if alone:
            _forced.add(subject)
        verdicts.learn(subject, key, verdict)
        return verdict


def _refreshed(subject: Subject, known: Verdict | None) -> Verdict | None:
    """What is on disk now, or else what was known."""
    found = verdicts.look_up(subject.key)
    if found is not None:
        verdicts.remember(subject, found)
    return found or known


def _missing(known: Verdict, shapes: Sequence[Sizes], exactly: bool) -> Sequence[Sizes]:
    """The shapes that a verdict says nothing about."""
    if known.kind == "unknown":
        return shapes if exactly or known.again else []
    if known.kind == "wrong":
        return []
    if not exactly:  # one shape nearby is enough: what was too disturbed to decide anything is not tried in every process
        return [] if any(known.near(shape) for shape in shapes) else shapes
    measured = {speed.shape for speed in known.speeds}
    return [shape for shape in shapes if shape not in measured]


@contextlib.contextmanager
def _alone() -> Iterator[bool]:
    """Whether this process is the one that proves: of many workers one does, and none waits."""
    with contextlib.ExitStack() as stack:
        alone = True
        try:
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / "verdicts.proving", wait=False))
        except BlockingIOError:
            alone = False
        except (OSError, RuntimeError, ImportError):
            pass  # no folder to meet in: every process proves for itself
        yield alone


def _announced(subject: Subject, key: Key, shapes: Sequence[Sizes]) -> Verdict:
    """Prove, and say so before and after."""
    own = verdicts.store()
    changed = [] if own is None or own.get(key) is not None else own.changed(key)
    since = f" (since the last time changed: {', '.join(changed)})" if changed else ""
    logger.warning(
        "negengine: proving the Triton kernels on %s in %s, once per machine%s; this takes seconds, at most %.0f",
        *(key.device, key.dtype, since, LIMIT),
    )
    verdict = _prove(subject, key, shapes)
    level = logging.INFO if verdict.kind in ("proven", "slower") else logging.WARNING
    logger.log(level, "negengine: the Triton kernels on %s in %s: %s%s", key.device, key.dtype, verdict, CONSEQUENCES[verdict.kind])
    return verdict


def _prove(subject: Subject, key: Key, shapes: Sequence[Sizes]) -> Verdict:
    """Run the child and judge what it leaves."""
    request = {
        "nonce": secrets.token_hex(16),
        "device": subject.device.type,
        "uuid": str(getattr(torch.cuda.get_device_properties(subject.device), "uuid", "")) if subject.device.type == "cuda" else "",
        "dtype": key.dtype,
        "search": key.search,
        "matching": key.matching,
        "cases": [case.name for case in prove.cases_for(key.architecture, key.matching)],
        "shapes": [list(shape) for shape in shapes],
    }
    try:
        with tempfile.TemporaryDirectory(prefix="negengine-") as name:
            folder = Path(name)
            (folder / "request.json").write_text(json.dumps(request))
            ended = run_child(folder)
            answer = folder / "answer.json"
            text = answer.read_text(errors="replace") if answer.exists() else ""
    except OSError as error:
        return Verdict(None, f"no child process could be run: {error}")
    return judge(request, key, text, ended)


def run_child(folder: Path) -> str | int:
    """Run the proof: its exit status, or why there is none.

    What it and the libraries below it print goes nowhere: the answer is a file, and nothing can fill a pipe.

    Raises:
        OSError: it cannot be started.
    """
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        child_command(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,  # where no module of the user's can stand in for another
        env={**os.environ, "PYTHONPATH": path, verdicts.VARIABLE: "trust"},
    )
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        return f"the proof did not end within {LIMIT:.0f} seconds"
    finally:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for its driver cannot be ended
            process.wait(5)


def child_command(folder: Path) -> list[str]:
    """How the proof is started.

    Raises:
        OSError: this program is no Python interpreter that could be started again.
    """
    name = Path(sys.executable or "").name.lower()
    if getattr(sys, "frozen", False) or not name.startswith(("python", "pypy")):
        raise OSError(f"sys.executable is {sys.executable!r}, which is not a Python interpreter")
    return [sys.executable, "-c", CHILD, str(folder)]


# --- the answer --------------------------------------------------------------------------------------------------


def judge(request: Mapping[str, Any], key: Key, text: str, ended: str | int) -> Verdict:
    """What an answer is worth. The child says what it saw; what follows from it is decided here.

    Args:
        text: the answer, a JSON object for each line. ended: the child's exit status, or why there is none.
    """
    parts = list(_parts(text))
    said = {name: value for part in parts for name, value in part.items()}
    if "nonce" in said and said["nonce"] != request["nonce"]:
        return _refused("it answers another question")
    if "key" in said and said["key"] != dataclasses.asdict(key):
        return _refused(f"it is about something else: {said['key']}")
    died = isinstance(ended, int) and ended < 0 and -ended in OWN_FAULT
    if "running" in said and died and "key" in said:
        return Verdict(False, f"the kernels ended their process with {signal.Signals(-ended).name}")  # type: ignore[operator]
    if isinstance(ended, str):
        return Verdict(None, ended)
    if "unknown" in said:
        return Verdict(None, str(said["unknown"]))
    if ended != 0 or said.get("done") is not True:
        return Verdict(None, f"the proof ended early, with exit status {ended}")
    if "nonce" not in said or "key" not in said:
        return _refused("it does not say what it is about")
    cases = [part["case"] for part in parts if "case" in part]
    if "wrong" in said:
        return Verdict(False, str(said["wrong"]), len(cases))
    expected = [*request["cases"], *(prove.large_case(shape).name for shape in request["shapes"])]
    if cases != expected:
        return _refused(f"it tried {len(cases)} of {len(expected)} cases")
    if said.get("witness") != prove.witness(request["nonce"], request["matching"]):
        return _refused("a result that is known beforehand is another one in it")
    try:
        speeds = [_speed(request, part["speed"]) for part in parts if "speed" in part]
    except (KeyError, TypeError, ValueError) as error:
        return _refused(f"its timings are none: {error}")
    decided = tuple(speed for speed in speeds if speed is not None)
    if not speeds:
        return _refused("it has no timings")
    reason = "" if decided else "the timings were too disturbed to decide anything"
    return Verdict(True, reason, len(cases), speeds=decided)


def _parts(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # half a line, of a process that died
            part = json.loads(line)
            if isinstance(part, dict):
                yield part


def _speed(request: Mapping[str, Any], said: Mapping[str, Any]) -> Speed | None:
    if said["shape"] not in request["shapes"]:
        raise ValueError(f"shape {said['shape']} was not asked for")
    times = [[float(ms) for ms in said[name]] for name in ("kernels", "fallback")]
    if any(len(rounds) != prove.ROUNDS or not all(math.isfinite(ms) and ms > 0 for ms in rounds) for rounds in times):
        raise ValueError(f"expected {prove.ROUNDS} positive times each")
    return Speed.judged(verdicts.sizes_of(said["shape"]), *times)


def _refused(why: str) -> Verdict:
    return Verdict(None, f"the answer of the proof was refused: {why}")
