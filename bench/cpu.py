"""The native CPU kernels beside their rivals: ``python bench/cpu.py [shape ...]`` writes bench/results/cpu.json.

Every variant in turn within one run, and a loop of the bare instruction before and after it: shared machines change their speed.
Ours writes a tensor that exists, as the in-place call does; the rivals return new ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from negengine.kernels.cpu import build, library

from negengine import reference
from negengine.bench import SHAPES, Shape, gemm, interleave, lean, release
from negengine.cli.environment import machine, versions
from negengine.ops import cpu, registry

ALPHA, THRESHOLD = 0.9, 0.65
SEARCHES = {torch.bfloat16: ("auto", "int8"), torch.float32: ("auto", "bf16", "int8")}
PRECISION = {(torch.bfloat16, "auto"): "bf16", (torch.float32, "auto"): "fp32"}
RESULT = Path(__file__).resolve().parent / "results" / "cpu.json"


def peak_program(folder: str) -> Path:
    target = Path(folder, "peak")
    source = build.FOLDER / "tests" / "peak.cpp"
    subprocess.run([*build.compiler(), "-O2", "-std=c++17", "-pthread", str(source), "-o", str(target)], check=True)
    return target


def peak(program: Path) -> dict[str, float]:
    """GOP/s of pure loops of each instruction on as many threads as torch uses."""
    out = subprocess.run([str(program), str(torch.get_num_threads())], capture_output=True, text=True, check=True).stdout
    return {name: float(rate) for name, rate in (line.split() for line in out.splitlines())}


def variants(x: torch.Tensor, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    y, table = torch.empty_like(x), reference.group_references("first", len(x), len(x))
    alpha, threshold = torch.full((len(x),), ALPHA, dtype=torch.float64), torch.full((1,), THRESHOLD, dtype=torch.float64)
    fused = registry._BACKENDS["cpu"].fused
    assert fused is not None

    def ours(search: str) -> Callable[[], object]:
        return lambda: fused(x, y, x, table, alpha, threshold, None, None, None, "paper", search)

    found: dict[str, Callable[[], object]] = {f"cpu {search}": ours(search) for search in SEARCHES[dtype]}
    found |= {"gemm": lambda: gemm(x), "lean": lambda: lean(x, ALPHA, THRESHOLD)}
    return found | {"release": lambda: release(x, ALPHA, THRESHOLD)}


def measure(shape: Shape, dtype: torch.dtype, rounds: int, program: Path) -> dict[str, Any]:
    cpu.workspace().release()
    before = peak(program)
    timings = interleave(variants(shape.inputs(dtype, "cpu"), dtype), rounds=rounds, warmup=1)
    after = peak(program)
    ours = {name: timing for name, timing in timings.items() if name.startswith("cpu ")}
    rivals = {name: timing for name, timing in timings.items() if name not in ours}
    rates = {name: shape.search_flop / timing.percentile(10) / 1e9 for name, timing in ours.items()}
    return {
        "seconds": {name: timing.summary() for name, timing in timings.items()},
        "ratio": {name: {rival: r.median / t.median for rival, r in rivals.items()} for name, t in ours.items()},
        "ratio of 10th percentiles": {
            name: {rival: r.percentile(10) / t.percentile(10) for rival, r in rivals.items()} for name, t in ours.items()
        },
        "gops": rates,
        "peak gops": {"before": before, "after": after},
        "workspace bytes kept": cpu.workspace().bytes,
    }


if __name__ == "__main__":
    names = sys.argv[1:] or list(SHAPES)
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "isa": library.isa(), "machine": machine(), "versions": versions()}
    with tempfile.TemporaryDirectory() as folder:
        program = peak_program(folder)
        for name in names:
            for dtype in SEARCHES:
                rounds = 15 if SHAPES[name].search_flop < 7e10 else 5
                row = measure(SHAPES[name], dtype, rounds, program)
                found.setdefault("shapes", {}).setdefault(name, {})[str(dtype).removeprefix("torch.")] = row
                for ours, ratios in row["ratio"].items():
                    print(name, dtype, ours, {rival: round(ratio, 2) for rival, ratio in ratios.items()}, flush=True)
                print("  peak", row["peak gops"], "ours", {k: round(v) for k, v in row["gops"].items()}, flush=True)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
