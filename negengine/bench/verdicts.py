"""The verdicts on the Triton kernels at the shapes of real models: ``python -m negengine.bench.verdicts --results out``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from negengine import ops
from negengine.bench.results import Results
from negengine.bench.shapes import SHAPES, shape_named

DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", type=shape_named, help="those of real models by default")
    parser.add_argument("--results", type=Path, required=True, help="folder; its verdicts.json is added to")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES[:1], choices=DTYPES)
    given = parser.parse_args(arguments)
    file = Results(given.results / "verdicts.json", "verdicts", proceed=True)
    sizes = [(shape.images, shape.tokens, shape.tokens, shape.channels) for shape in given.shapes or SHAPES.values()]
    kinds = []
    for dtype in given.dtypes:
        verdict = ops.verify(given.device, getattr(torch, dtype), "exact", shapes=sizes, mode="force")
        row = {"dtype": dtype, "search": "exact", "matching": "paper", "kind": verdict.kind, "reason": verdict.reason}
        file.add([row | {"cases": verdict.cases, "speeds": [str(speed) for speed in verdict.speeds]}])
        print(f"{dtype}: {verdict.kind} {verdict.reason}", *verdict.speeds, sep="\n  ", flush=True)
        kinds.append(verdict.kind)
    return 0 if all(kind in ("proven", "slower") for kind in kinds) else 1


if __name__ == "__main__":
    sys.exit(main())
