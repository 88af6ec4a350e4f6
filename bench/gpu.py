"""What a machine with a GPU has to tell, in one sitting: ``python bench/gpu.py fast --results out/gpu``.

Needs torch, triton and pytest, no installation: the checkout is used as it is. A part is a list of sections. Each section runs in
processes of its own, for as long as its limit and the part's clock allow, and leaves a log; one that fails, hangs or crashes the
driver of the GPU costs the others nothing. What is measured is in the results after each case, and everything is packed into one
archive after each section, so that whoever stops the run loses only what was not yet measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE, SUMMARY, RECORD, RUNNING = "results.tar.gz", "summary.txt", "run.json", "running.log"
MOST_FILES = 8  # in the folder of results, the archive among them: more than this some machines do not hand back
GRACE = 5.0  # seconds that a process has to say where it hangs, and that the last archive takes
NOTHING_COLLECTED = 5  # exit code of pytest
SMI = "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,memory.used"


@dataclass(frozen=True)
class Section:
    """A step of a run.

    Attributes:
        commands: run at the same time.
        limit: seconds.
        unless: name of an earlier section; this one runs only where that one did not pass.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    unless: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a section: ``"passed"``, ``"failed"``, ``"out of time"`` or ``"left out"``, and why if not the first.

    Attributes:
        gpu: what nvidia-smi said before it began.
        tail: the last lines of its log.
    """

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    gpu: str = ""
    tail: tuple[str, ...] = ()


# --- the parts ---------------------------------------------------------------------------------------------------

SHAPES = ("flux-1024", "flux-768", "sdxl-64", "sdxl-32")
REHEARSED = ("3x40x48", "3x33x48", "3x40x16", "3x17x32")  # what an interpreter does in seconds
LOOPS = {"sdxl-base": "5", "flux-dev": "4"}  # steps, of which NegToMe acts in one: with 4, SDXL has none in its window
SLACK = 6  # times as long as on a GPU
PARTS = {  # seconds of each
    "fast": 300, "models": 470, "cases": 470, "compiled": 470, "tiles": 470, "contract": 470, "suite": 470,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Where a run happens, and its sections from that.

    Attributes:
        results: folder.
        jobs: processes that compile at the same time.
        device: ``"cuda"``, or ``"cpu"`` for a rehearsal under Triton's interpreter.
        shapes: the one that matters most first.
    """

    results: Path
    jobs: int
    device: str = "cuda"
    shapes: tuple[str, ...] = SHAPES

    def sections(self, part: str) -> list[Section]:
        """The sections of a part, the most telling first."""
        smallest = self.shapes[-1:]
        if part == "fast":
            tiles = [self.measuring(f"tiles {shape}", 60, "tiles", shape, *self.rounds) for shape in self.shapes]
            tests = [self.gpu_tests(75), self.contract(3, 90), self.guidance(75)]
            return [*self.operator(self.shapes, 60), *tests, *tiles, self.verdicts(90)]
        if part == "models":  # needs diffusers, typer and rich
            return [self.model(name, 150, compiled) for compiled in (False, True) for name in LOOPS]
        if part == "cases":
            kinds = ("--matching release", "--dtype float16", "--dtype float32")
            found = [section for kind in kinds for section in self.operator(self.shapes, 120, *kind.split())]
            return found + [section for gate in ("all", "none") for section in self.operator(smallest, 60, "--gate", gate)]
        if part == "compiled":
            return self.operator(self.shapes, 240, "--compiled")
        if part == "tiles":
            tiles = [self.measuring(f"all tiles {shape}", 300, "tiles", shape, "--every", *self.rounds) for shape in self.shapes]
            return [*tiles, self.verdicts(200, "--dtypes", "float16", "float32")]
        if part == "contract":
            return [self.contract(50, 460)]
        names = ("guidance", "host", "end_to_end", "scaling")  # these need pytest-benchmark, the second and third diffusers
        where = ("--results", str(self.results), "-p", "no:cacheprovider")
        return [Section(name, ((sys.executable, "-m", "pytest", f"bench/test_{name}.py", *where),), 400) for name in names]

    @property
    def rounds(self) -> tuple[str, ...]:
        """Arguments; an interpreter takes a second for what a GPU does in a microsecond."""
        return ("--rounds", "1") if self.device == "cpu" else ()

    def verdicts(self, limit: float, *choice: str) -> Section:
        return self.measuring("verdicts", limit, "verdicts", *self.shapes, *choice)

    def measuring(self, name: str, limit: float, module: str, *arguments: str, unless: str | None = None) -> Section:
        where = ("--results", str(self.results), "--device", self.device)
        return Section(name, ((sys.executable, "-m", f"negengine.bench.{module}", *arguments, *where),), limit, unless=unless)

    def model(self, name: str, limit: float, compiled: bool) -> Section:
        """Whole loops, eager or with compiled blocks, into one file."""
        how = ("--no-eager", "--compiled", "blocks") if compiled else ()
        tiny = ("--depth", "1+1", "--images", "2", "--size", "512", "--dtype", "float32", "--rounds", "1")
        full = ("--images", "4", "--size", "1024", "--rounds", "3", "--seconds", "60")
        where = ("--output", str(self.results), "--device", self.device, "--steps", LOOPS[name])
        command = (sys.executable, "-m", "negengine.cli", "bench", "model", "--model", name)
        named = f"model {name}, compiled blocks" if compiled else f"model {name}"
        return Section(named, ((*command, *how, *where, *(tiny if self.device == "cpu" else full)),), limit)

    def operator(self, shapes: Iterable[str], limit: float, *choice: str) -> list[Section]:
        """The operator beside its rivals at each shape; where our kernels broke that, the rivals and the fallback without them."""
        found = []
        for shape in shapes:
            name = " ".join(("operator", shape, *choice))
            found.append(self.measuring(name, limit, "calls", shape, *choice, *self.rounds))
            spared = (*self.rounds, "--backends", "torch")
            found.append(self.measuring(f"{name} without triton", limit, "calls", shape, *choice, *spared, unless=name))
        return found

    def gpu_tests(self, limit: float) -> Section:
        jobs = min(self.jobs, 4)  # torch.compile takes memory and processes of its own
        return Section("tests that need a GPU", shards(jobs, "tests/kernels/test_triton_gpu.py", "-m", "gpu"), limit)

    def contract(self, examples: int, limit: float) -> Section:
        kernels = f"triton-{self.device} and not auto"  # which is exact
        chosen = kernels if self.device == "cpu" else f"({kernels}) or torch-{self.device}"  # on CPUs `make test` has the fallback
        command = shards(self.jobs, "tests/ops/test_contract.py", "-k", chosen)
        return Section(f"contract, {examples} examples", command, limit, {"NEGENGINE_EXAMPLES": str(examples)})

    def guidance(self, limit: float) -> Section:
        chosen = "triton" if self.device == "cpu" else self.device
        command = shards(self.jobs, "tests/ops/test_guidance.py", "-k", f"{chosen} and not opcheck")
        return Section("guidance's contract", command, limit, {"NEGENGINE_EXAMPLES": "3"})


def shards(jobs: int, *arguments: str) -> tuple[tuple[str, ...], ...]:
    """pytest in several processes, each of which takes its share of the tests."""
    command = (sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider", *arguments)
    return tuple((*command, "--shard", f"{number}/{jobs}") for number in range(jobs))


# --- running -----------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The run was asked to end."""


def gpu_state() -> str:
    """What nvidia-smi says of the GPUs now, or why it says nothing."""
    try:
        command = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=GRACE, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"


def execute(commands: Sequence[Sequence[str]], limit: float, environment: dict[str, str], log: Path) -> list[int | None]:
    """Exit codes of commands that run at the same time; None for one that was ended at the limit.

    The lines of all go to ``log`` as they are printed, with the number of their command where there are several.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"} | environment
    if len(commands) > 1:
        variables["OMP_NUM_THREADS"] = "1"
    processes: list[subprocess.Popen[bytes]] = []
    readers: list[threading.Thread] = []
    with log.open("wb", buffering=0) as file:

        def copy(process: subprocess.Popen[bytes], mark: bytes) -> None:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(mark + line)

        try:
            for number, command in enumerate(commands):
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=variables, cwd=ROOT, start_new_session=True
                )
                processes.append(process)
                mark = f"[{number}] ".encode() if len(commands) > 1 else b""
                readers.append(threading.Thread(target=copy, args=(process, mark), daemon=True))
                readers[-1].start()
            return _wait(processes, time.monotonic() + limit)
        finally:
            for process in processes:
                _kill(process, signal.SIGKILL)
            for reader in readers:
                reader.join(GRACE)


def _wait(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in processes]
        late = [process for process in processes if process.poll() is None]
        for process in late:
            _kill(process, signal.SIGABRT)  # Python then prints where it is
        end = time.monotonic() + GRACE
        while time.monotonic() < end and any(process.poll() is None for process in late):
            time.sleep(0.05)
        return codes
    return [process.returncode for process in processes]


def _kill(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """The process and all that it started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
    except PermissionError:  # of a group that is only a zombie, some systems say so
        return


def telling(lines: Sequence[str], most: int = 16) -> tuple[str, ...]:
    """Of a log, the tests that failed and the last lines; where several processes wrote it, the last line of each."""
    last = {line.split("]")[0]: line for line in lines if line.startswith("[")}
    failed = [line for line in lines if " FAILED " in line or line.startswith(("FAILED", "ERROR"))]
    ends = list(last.values()) if len(last) > 1 else lines[-most // 2 :]
    return tuple(dict.fromkeys([*failed[: most // 2], *ends]))


def judged(codes: Sequence[int | None]) -> tuple[str, str]:
    """Status and reason from the exit codes of a section's commands."""
    if None in codes:
        return "out of time", f"{codes.count(None)} of {len(codes)} processes ran into the limit" if len(codes) > 1 else ""
    bad = [code for code in codes if code not in (0, NOTHING_COLLECTED)]
    if bad:
        said = {code: f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}" for code in bad}
        return "failed", ", ".join(dict.fromkeys(said.values()))
    return ("passed", "") if 0 in codes else ("failed", "no test was collected")


class Run:
    """One part: its clock, its folder, what became of its sections."""

    def __init__(self, part: str, seconds: float, results: Path) -> None:
        self.results, self.seconds, self.begun = results, seconds, time.monotonic()
        self.outcomes: list[Outcome] = []
        self.about = {"part": part, "date": time.strftime("%Y-%m-%d %H:%M:%S"), "seconds": seconds, "python": sys.version}
        results.mkdir(parents=True, exist_ok=True)
        self._logs = tempfile.TemporaryDirectory(prefix="negengine-gpu-")
        self._summary = (results / SUMMARY).open("w", buffering=1)
        self.say(f"{part}: at most {seconds:.0f} s; {gpu_state()}")

    @property
    def left(self) -> float:
        return self.seconds - GRACE - (time.monotonic() - self.begun)

    def say(self, text: str) -> None:
        print(text, flush=True)
        self._summary.write(text + "\n")

    def all(self, sections: Iterable[Section]) -> bool:
        """Run the sections; true if all passed. Whatever ends it, the archive has what there is."""
        try:
            for section in sections:
                self._keep(self._section(section))
        except BaseException as error:
            self.say(f"stopped after {time.monotonic() - self.begun:.0f} s: {type(error).__name__} {error}")
            raise
        finally:
            self._pack()
        failed = [outcome.name for outcome in self.outcomes if outcome.status not in ("passed", "not needed")]
        self.say(f"{time.monotonic() - self.begun:.0f} s; " + (f"did not pass: {', '.join(failed)}" if failed else "all passed"))
        self._pack()
        return not failed

    def _section(self, section: Section) -> Outcome:
        earlier = next((outcome for outcome in self.outcomes if outcome.name == section.unless), None)
        if section.unless is not None and (earlier is None or earlier.status == "passed"):
            return Outcome(section.name, "not needed")
        if self.left <= 0:
            return Outcome(section.name, "left out", "no time was left")
        log, state, begun = self.results / RUNNING, gpu_state(), time.monotonic()
        try:
            status, reason = judged(execute(section.commands, min(section.limit, self.left), section.environment, log))
        except OSError as error:
            status, reason = "failed", str(error)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return Outcome(section.name, status, reason, round(time.monotonic() - begun, 2), state, telling(lines))

    def _keep(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if outcome.status == "not needed":
            return
        self.say(
            f"{outcome.seconds:6.1f} s  {outcome.status:11} {outcome.name}" + (f" ({outcome.reason})" if outcome.reason else "")
        )
        for line in outcome.tail if outcome.status != "passed" else outcome.tail[-8:]:
            self.say(f"          {line[:200]}")
        record = self.about | {"sections": [dataclasses.asdict(done) for done in self.outcomes]}
        part = self.results / f"{RECORD}.part"
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(self.results / RECORD)
        running = self.results / RUNNING
        if running.exists():
            name = f"{len(self.outcomes):02}-{outcome.name.replace(' ', '-')}.log"
            Path(self._logs.name, name).write_bytes(running.read_bytes())
            running.unlink()
        self._pack()

    def _pack(self) -> None:
        """Everything so far in one file, which is whole at any moment."""
        part = self.results / f"{ARCHIVE}.part"
        with tarfile.open(part, "w:gz") as archive:
            for path in sorted(self.results.iterdir()):
                if path.is_file() and path.name != ARCHIVE and path.suffix != ".part":
                    archive.add(path, f"results/{path.name}")
            for path in sorted(Path(self._logs.name).iterdir()):
                archive.add(path, f"results/logs/{path.name}")
        part.replace(self.results / ARCHIVE)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS, help="; ".join(f"{name}: {seconds} s" for name, seconds in PARTS.items()))
    parser.add_argument("--results", type=Path, required=True, help="a folder that holds no run yet")
    parser.add_argument("--seconds", type=float, help="of the whole part, instead of its own number")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile at the same time")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny shapes, the kernels in Triton's interpreter")
    given = parser.parse_args(arguments)
    results = given.results.resolve()
    if (results / RECORD).exists():
        parser.error(f"{results} holds a run already; remove it or name another folder")
    plan, seconds = Plan(results, given.jobs), given.seconds or PARTS[given.part]
    if given.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        plan = Plan(results, given.jobs, "cpu", REHEARSED)
        seconds *= SLACK
    signal.signal(signal.SIGTERM, _stop)
    sections = plan.sections(given.part)
    if given.rehearse:
        sections = [dataclasses.replace(section, limit=SLACK * section.limit) for section in sections]
    return 0 if Run(given.part, seconds, results).all(sections) else 1


def _stop(number: int, frame: object) -> None:
    raise Stopped(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
