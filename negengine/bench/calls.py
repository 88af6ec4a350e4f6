"""One case of the operator beside its rivals, in a process of its own: ``python -m negengine.bench.calls flux-1024 --results out``.

A variant that fails is left out and named, and the others are measured all the same; the exit code is then 1. Needs torch alone,
and triton for its kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from negengine.bench import suite
from negengine.bench.results import Results, table
from negengine.bench.shapes import GATES, shape_named
from negengine.bench.suite import Case
from negengine.bench.variants import variants
from negengine.reference import MATCHINGS

DTYPES = ("bfloat16", "float16", "float32")


def failures(case: Case, device: str) -> dict[str, str]:
    """Name of each variant that does not get through one call -> the error.

    After an error that leaves the GPU's context unusable, every later variant fails as well.
    """
    found, _ = variants([case.shape.inputs(case.dtype, device, gate=case.gate)], case.matching, **case.choice)
    failed = {}
    for variant in found:
        try:
            variant.run()
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # whatever a compiler or a driver throws
            failed[variant.name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    return failed


def measure(case: Case, device: str, file: Results, rounds: int) -> dict[str, str]:
    """Add a case to the file; returns the variants that failed."""
    failed = failures(case, device)
    file.add([], left_out={f"{case.name}: {name}": f"failed: {error}" for name, error in failed.items()})
    skip = [*case.choice.get("skip", ()), *failed]
    measured = suite.measure(dataclasses.replace(case, choice=case.choice | {"skip": skip}), device, rounds)
    suite.record(case, measured, file)
    print(table([dataclasses.asdict(row) for row in measured.rows]))
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", type=shape_named)
    parser.add_argument("--results", type=Path, required=True, help="folder; its operator.json is added to")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default=DTYPES[0], choices=DTYPES)
    parser.add_argument("--matching", default=MATCHINGS[0], choices=MATCHINGS)
    parser.add_argument("--gate", default=GATES[0], choices=GATES)
    parser.add_argument("--backends", nargs="+", help="of ours; all that can run by default")
    parser.add_argument("--compiled", action="store_true", help="also the rivals under torch.compile")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args(arguments)
    choice = {"compiled": given.compiled, "backends": given.backends}
    case = Case(given.shape, getattr(torch, given.dtype), given.matching, given.gate, choice)
    failed = measure(case, given.device, Results(given.results / "operator.json", "operator", proceed=True), given.rounds)
    for name, error in failed.items():
        print(f"{case.name}: {name} failed: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
