"""Memory that this process can still have."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path("/")  # of the system's own files
VERSIONS = (  # of control groups: where they lie, a group's limit, and what it uses
    ("sys/fs/cgroup", "memory.max", "memory.current"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def free_bytes(device: str) -> int:
    """Of a GPU what is free; else the least of what the system, its control groups and the process's own limit leave.

    Raises:
        RuntimeError: the system does not tell.
    """
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min((_available(), *_left_in_groups(), *_left_of_addresses())))


def _available() -> int:
    file = ROOT / "proc/meminfo"
    if file.exists():
        told = [line.split() for line in file.read_text().splitlines() if line.startswith("MemAvailable")]
        if told:
            return 1024 * int(told[0][1])
    if importlib.util.find_spec("psutil") is None:
        raise RuntimeError("this system does not tell how much memory is free; pip install psutil, which can ask it")
    import psutil

    return psutil.virtual_memory().available


def _left_in_groups() -> Iterator[int]:
    """Limit less use of the groups that the process is in, outer ones among them. What files occupy can be taken back."""
    file = ROOT / "proc/self/cgroup"
    lines = [line.split(":", 2) for line in file.read_text().splitlines()] if file.exists() else []
    for mounted, limit, use in VERSIONS:
        one = mounted.endswith("memory")
        paths = [path for _, controllers, path in lines if ("memory" in controllers.split(",") if one else not controllers)]
        for path in paths:
            folder = ROOT / mounted / path.strip("/")
            for group in (folder, *folder.parents):
                found = [_number(group / name) for name in (limit, use)]
                if found[0] is not None and found[1] is not None:
                    yield found[0] - found[1] + _files(group / "memory.stat")
                if group == ROOT / mounted:
                    break


def _number(file: Path) -> int | None:
    """None where there is no such file, or it holds ``max``."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _files(stat: Path) -> int:
    """Bytes of a group's file cache that was not used lately."""
    try:
        told = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(told.get("total_inactive_file", told.get("inactive_file", 0)))


def _left_of_addresses() -> Iterator[int]:
    """``ulimit -v`` less what is mapped."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    mapped = ROOT / "proc/self/statm"
    if limit != resource.RLIM_INFINITY and mapped.exists():
        yield limit - int(mapped.read_text().split()[0]) * resource.getpagesize()
