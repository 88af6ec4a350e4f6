"""The verdicts on the Triton kernels at the shapes of real models: ``python -m negengine.bench.verdicts --results out``.

``--ship`` proves nothing: it adds the verdicts in ``--results`` to those that come with the package, for any driver.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from negengine import ops
from negengine.bench.results import Results
from negengine.bench.shapes import SHAPES, shape_named
from negengine.ops import verdicts
from negengine.ops.establish import Subject

DTYPES = ("bfloat16", "float16", "float32")


def ship(folder: Path) -> None:
    """Verdicts of an exact search that decided something hold for ``auto``, too, which comes to it.

    Raises:
        ValueError: a verdict on other sources than these.
    """
    rows = json.loads((folder / "verdicts.json").read_text())["rows"]
    for row in rows:
        if row["key"]["kernels"] != verdicts.fingerprint():
            raise ValueError(f"the verdict in {row['dtype']} is on the sources {row['key']['kernels']}; measure these anew")
    store = verdicts.Store(verdicts.SHIPPED)
    for row in rows:
        verdict = verdicts.Verdict.from_json(row["verdict"])
        if verdict is not None and verdict.kind in ("proven", "slower") and row["search"] == "exact":
            for search in ("exact", "auto"):
                store.put(verdicts.Key(**row["key"] | {"search": search, "driver": verdicts.ANY_DRIVER}), verdict)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shapes", nargs="*", type=shape_named, help="those of real models by default")
    parser.add_argument("--results", type=Path, required=True, help="folder; its verdicts.json is added to")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES[:1], choices=DTYPES)
    parser.add_argument("--ship", action="store_true", help="add what was measured to the package, and prove nothing")
    given = parser.parse_args(arguments)
    if given.ship:
        ship(given.results)
        return 0
    file = Results(given.results / "verdicts.json", "verdicts", proceed=True)
    sizes = [(shape.images, shape.tokens, shape.tokens, shape.channels) for shape in given.shapes or SHAPES.values()]
    kinds = []
    for dtype in given.dtypes:
        verdict = ops.verify(given.device, getattr(torch, dtype), "exact", shapes=sizes, mode="force")
        row = {"dtype": dtype, "search": "exact", "matching": "paper", "kind": verdict.kind, "reason": verdict.reason}
        key = Subject(torch.device(given.device, 0), getattr(torch, dtype), "exact", "paper").key
        row |= {"key": dataclasses.asdict(key), "verdict": verdict.to_json()}
        file.add([row | {"cases": verdict.cases, "speeds": [str(speed) for speed in verdict.speeds]}])
        print(f"{dtype}: {verdict.kind} {verdict.reason}", *verdict.speeds, sep="\n  ", flush=True)
        kinds.append(verdict.kind)
    return 0 if all(kind in ("proven", "slower") for kind in kinds) else 1


if __name__ == "__main__":
    sys.exit(main())
