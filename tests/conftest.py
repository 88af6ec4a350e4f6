"""Shared by all tests."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER is not None:  # processes side by side compile into folders of their own
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ[name] = str(Path(tempfile.gettempdir(), f"negengine-tests-{os.getuid()}", WORKER, name.split("_")[0].lower()))

LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="of all tests every N-th, from the I-th: a share for one of N processes")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--shard"):
        number, count = map(int, config.getoption("--shard").split("/"))
        config.hook.pytest_deselected(items=[item for place, item in enumerate(items) if place % count != number])
        items[:] = items[number::count]
    items.sort(key=lambda item: item.get_closest_marker("long") is None)  # else one process waits for the other at the end


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[LEFT_OUT] += item.get_closest_marker("exhaustive") is not None


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """Every process collects, and so deselects, the same."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[LEFT_OUT] and "not exhaustive" in config.option.markexpr:
        terminalreporter.write_line(f"{config.stash[LEFT_OUT]} exhaustive tests were left out; `make test-all` runs them")
