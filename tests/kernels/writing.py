"""What a process of its own does in a test of the cache: here, so that it imports nothing slow."""

from __future__ import annotations

from pathlib import Path

from negengine.kernels.triton.tuning import Cache, MatchConfig, Versions

HERE = Versions("a device", "2.13", "3.9", "kernels")


def write(path: Path, name: str) -> None:
    for i in range(25):
        Cache(path).put(HERE, f"{name} {i}", MatchConfig(i + 1, 64, 64, 4, 3))
