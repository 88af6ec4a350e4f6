"""Options of the speed suite, its files, and what it says at the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).resolve().parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("negengine")
    group.addoption("--all-cases", action="store_true", help="also what takes long on a CPU: every shape, rival and matching")
    group.addoption("--results", type=Path, help="folder of the results; bench/results/DEVICE by default")
    group.addoption("--isa", help="native CPU kernels restricted to an instruction set: portable, avx2, avx512, ...")
    group.addoption("--rounds", type=int, help="of every measurement, for a quick look; the defaults are what is published")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--isa"):
        os.environ["NEGENGINE_CPU_ISA"] = config.getoption("--isa")  # read when the library is opened, also by child processes
    config.stash[STUDY] = Study(config)


class Study:
    """The files of this session."""

    def __init__(self, config: pytest.Config) -> None:
        self.everything: bool = config.getoption("--all-cases")
        self._rounds, self._isa, self._folder = (config.getoption(f"--{name}") for name in ("rounds", "isa", "results"))
        self._files = {}

    def rounds(self, usual: int) -> int:
        return self._rounds or usual

    def path(self, name: str) -> Path:
        from negengine.bench.results import device_name

        folder = self._folder or RESULTS / device_name(DEVICE)
        stem, dot, suffix = name.rpartition(".")
        return folder / (f"{stem}-{self._isa}{dot}{suffix}" if self._isa else name)

    def file(self, what: str):
        """The JSON file of a study, begun anew in each session."""
        from negengine.bench.results import Results

        if what not in self._files:
            self._files[what] = Results(self.path(f"{what}.json"), what)
        return self._files[what]

    def documents(self) -> dict[str, dict]:
        return {what: file.document for what, file in self._files.items() if file.document["rows"]}

    def plot(self) -> list[Path]:
        from negengine.bench import plots

        found, written = self.documents(), []
        if "operator" in found:
            first = found["operator"]["rows"][0]  # of a part of the suite, what there is
            written.append(plots.time_against_floor(found["operator"], self.path("floor.png"), first["matching"], first["gate"]))
        if "scaling" in found:
            for dtype in dict.fromkeys(row["dtype"] for row in found["scaling"]["rows"]):
                written.append(plots.scaling(found["scaling"], self.path(f"scaling-{dtype}.png"), dtype))
        ends = [found[what] for what in ("pipelines", "stacks") if what in found]
        return written + ([plots.overhead(ends, self.path("end-to-end.png"))] if ends else [])


STUDY = pytest.StashKey[Study]()


@pytest.fixture
def study(request: pytest.FixtureRequest) -> Study:
    return request.config.stash[STUDY]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    from negengine.bench.results import omissions, table

    study, say = config.stash[STUDY], terminalreporter.write_line
    documents = study.documents()
    if "operator" in documents:
        terminalreporter.section("the operator: theirs / ours at the end of our lines")
        say(table(documents["operator"]["rows"]))
    for what in ("pipelines", "stacks"):
        for row in documents.get(what, {"rows": []})["rows"]:
            name = row.get("pipeline") or f"{row['stack']} {row['dtype']}"
            say(f"{name:18} {row['variant']:10} {row['median']:8.3f} s  {row['overhead']:+7.1%}  (noise {row['noise']:.1%})")
    for row in documents.get("guidance", {"rows": []})["rows"]:
        ratios = ", ".join(f"{name} {value:.2f}" for name, value in row["ratio"].items())
        say(f"{row['case']:30} {row['variant']:16} {1e3 * row['median']:9.3f} ms  of floor {row['floor_reached']:5.0%}  {ratios}")
    if "host" in documents:
        from negengine.bench import host

        say(host.table(documents["host"]["rows"]))
    left_out = {name: why for document in documents.values() for name, why in document["left_out"].items()}
    if left_out:
        terminalreporter.section("left out")
        say(omissions(left_out))
    for path in [study.path(f"{what}.json") for what in documents] + study.plot():
        say(f"wrote {path}")
