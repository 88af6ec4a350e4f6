"""The tiles that the Triton search can take, side by side: ``python -m negengine.bench.tiles flux-1024 --results out``.

Each tile runs the whole call, exact and in bfloat16, in turn with the bare matrix product of the vendor's library; its row is
written before the next one is compiled. ``rows_equal`` is the share of rows that have the bits of the first tile's result: tiles
add in different orders, so near ties may go to another token.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from negengine.bench import rivals, suite
from negengine.bench.results import Results
from negengine.bench.shapes import Shape, shape_named
from negengine.bench.suite import Case
from negengine.bench.variants import ours
from negengine.interleave import interleave, interleave_graphs
from negengine.kernels.triton import launch, tuning
from negengine.kernels.triton.tuning import MatchConfig
from negengine.ops import repeated

DTYPE = torch.bfloat16


def tiles(architecture: tuning.Architecture, every: bool) -> list[MatchConfig]:
    """What tuning may choose from, the preset ones first; without ``every``, one of each size."""
    found = tuning.candidates(DTYPE.itemsize, architecture, True)
    if every:
        return found
    sizes: dict[tuple[int, ...], MatchConfig] = {}
    for tile in found:
        sizes.setdefault((tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.halvings), tile)
    return list(sizes.values())


@contextlib.contextmanager
def every_call_takes(tile: MatchConfig) -> Iterator[None]:
    """The search runs with this tile, whatever the shape asks for."""
    usual = tuning.match_config
    tuning.match_config = lambda *arguments, **settings: tile
    _plan_anew()
    try:
        yield
    finally:
        tuning.match_config = usual
        _plan_anew()


def _plan_anew() -> None:
    """What is planned already keeps its tile."""
    launch._plans.clear()
    repeated._known.clear()


def measure(shape: Shape, device: str, file: Results, every: bool, rounds: int) -> int:
    """A row of each tile; returns how many failed."""
    xs = suite.input_sets(Case(shape, DTYPE), device)
    clock = interleave_graphs if device == "cuda" else interleave
    usual = tuning.match_config(
        tuning.Shape(shape.images, 1, shape.tokens, shape.tokens, shape.channels), DTYPE.itemsize, _here(device), True
    )
    first: Tensor | None = None
    failed = 0
    for tile in dict.fromkeys([usual, *tiles(_here(device), every)]):
        variant = ours(xs, "paper", "triton", "exact")
        row: dict[str, Any] = {"shape": shape.name, "tile": dataclasses.asdict(tile), "usual": tile == usual}
        try:
            with every_call_takes(tile):
                result = variant.run()[0].clone()
                calls = {"tile": variant.run, "gemm": lambda: [rivals.gemm(x) for x in xs]}
                assert variant.prepare is not None
                timings = clock(calls, rounds=rounds, warmup=min(2, rounds), prepare={"tile": variant.prepare})
        except Exception as error:  # the device has not what it takes, or the compiler fails
            file.add([row | {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}])
            print(f"{shape.name} {_named(tile)}: {type(error).__name__} {error}", flush=True)
            failed += 1
            continue
        first = result if first is None else first
        row["rows_equal"] = (result == first).all(-1).double().mean().item()
        row |= {name: value / len(xs) for name, value in timings["tile"].summary().items() if name != "rounds"}
        row |= {
            "gemm": timings["gemm"].median / len(xs),
            "ratio": timings["gemm"].median / timings["tile"].median,
            "rounds": rounds,
        }
        file.add([row])
        print(f"{shape.name} {_named(tile)}: {row['median'] * 1e3:.3f} ms, gemm / it {row['ratio']:.3f}", flush=True)
    return failed


def _here(device: str) -> tuning.Architecture:
    return launch.architecture(torch.device(device))


def _named(tile: MatchConfig) -> str:
    """Its sizes, and the settings that are not zero."""
    settings = dataclasses.asdict(tile)
    size = "x".join(str(settings.pop(name)) for name in ("block_m", "block_n", "block_k"))
    return ", ".join([size, *(name if value is True else f"{name} {value}" for name, value in settings.items() if value)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", type=shape_named)
    parser.add_argument("--results", type=Path, required=True, help="folder; its tiles.json is added to")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: under TRITON_INTERPRET=1 only")
    parser.add_argument("--every", action="store_true", help="also other numbers of stages and orders of the work")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args(arguments)
    file = Results(given.results / "tiles.json", "tiles", proceed=True)
    return 1 if measure(given.shape, given.device, file, given.every, given.rounds) else 0


if __name__ == "__main__":
    sys.exit(main())
