"""Predict what a call takes on GPUs that are not here: ``python bench/predict.py`` writes bench/results/predicted.json.

The kernels are compiled as a call would launch them, and their machine code is read; ``bench/tables.py`` then writes
docs/predicted.md. A prediction is signed with the sources that it was made from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "predicted.json"
MODEL = ("sass", "machines", "launches", "model", "shapes", "guidance_model")
DTYPE = "bf16"


def fingerprint() -> str:
    """Of the kernels and of the model."""
    sources = sorted((ROOT / "kernels" / "triton").glob("*.py")) + [ROOT / "negengine" / "bench" / f"{name}.py" for name in MODEL]
    digest = hashlib.sha256()
    for source in [*sources, Path(__file__)]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def row(machine: Any, shape: Any) -> dict[str, Any]:
    import torch

    from negengine.bench import launches, model, sass

    found = launches.recorded(shape, torch.bfloat16, machine.architecture)
    match = next(launch for launch in found if launch.name == "match_kernel")
    parts = sass.search_of(sass.instructions(sass.disassembled(match.cubin)))
    tile = model.tile(parts, match, DTYPE, machine)
    predicted = model.predict(found, shape, DTYPE, machine)
    return {
        "machine": machine.name,
        "results": machine.results,
        "architecture": machine.architecture,
        "shape": shape.name,
        "dtype": DTYPE,
        "tile": [match.values[f"BLOCK_{side}"] for side in "MNK"],
        "warps": match.warps,
        "registers": match.registers,
        "instructions": {name: len(getattr(parts, name)) for name in ("step", "prologue", "epilogue")},
        "prefetched": parts.prefetched,
        "cycles": {"step": tile.step, "exposed": tile.exposed},
        "fill": predicted.fill,
        "seconds": {name: getattr(predicted, name) for name in ("product", "norms", "match", "merge", "whole")},
        "ratio": predicted.ratio,
        "sensitivity": model.sensitivity(found, shape, DTYPE, machine),
    }


def guidance_row(machine: Any, operator: str, shape: tuple[int, ...]) -> dict[str, Any]:
    import torch

    from negengine.bench import guidance_model

    call = (operator, shape, torch.bfloat16, machine)
    return {
        "machine": machine.name,
        "operator": operator,
        "shape": list(shape),
        "dtype": DTYPE,
        "bytes": guidance_model.moved(*call[:3]),
        "floor": guidance_model.floor(*call),
        "seconds": guidance_model.predict(*call),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compile nothing; fail where the prediction is of other sources")
    if parser.parse_args().check:
        signed = json.loads(RESULT.read_text())["fingerprint"]
        if signed == fingerprint():
            return 0
        print(f"{RESULT.relative_to(ROOT)} is of the sources {signed}, and these are {fingerprint()}: run `make predict`")
        return 1
    import triton

    from negengine.bench.guidance_model import CASES
    from negengine.bench.machines import MACHINES
    from negengine.bench.shapes import SHAPES

    guidance = [guidance_row(machine, *case) for machine in MACHINES.values() for case in CASES]
    rows = []
    for machine in MACHINES.values():
        for shape in SHAPES.values():
            rows.append(row(machine, shape))
            print(f"{machine.name} {shape.name}: predicted {rows[-1]['ratio']:.2f} of the bare product", flush=True)
    document = {
        "schema": 1,
        "what": "predicted, not measured",
        "fingerprint": fingerprint(),
        "triton": triton.__version__,
        "rows": rows,
        "guidance": guidance,
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
