"""How far the memory of the process grows during one call.

On a GPU that is what torch's allocator counts. On a CPU the peak of the resident set is reset before the call, in a fresh process:
``python -m negengine.bench.memory JSON``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from negengine.bench.shapes import Shape
from negengine.bench.variants import Variant, variants

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
Growth = dict[str, dict[str, int | None]]  # name -> "extra_bytes", "workspace_bytes"


def growth(shape: Shape, dtype: torch.dtype, device: str, matching: str, **choice: Any) -> Growth:
    """Of every variant that ``variants(..., **choice)`` gives; empty on a CPU whose system does not tell."""
    if device == "cuda":
        return {v.name: _gpu_growth(v) for v in variants([shape.inputs(dtype, device)], matching, **choice)[0]}
    if not CLEAR.exists():
        return {}
    sizes, threads = (shape.images, shape.tokens, shape.channels), torch.get_num_threads()
    task: dict[str, Any] = {"sizes": sizes, "dtype": str(dtype).removeprefix("torch."), "threads": threads}
    task |= {"matching": matching, "choice": choice}
    done = subprocess.run([sys.executable, "-m", __name__, json.dumps(task)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _gpu_growth(variant: Variant) -> dict[str, int | None]:
    variant.run()  # compiles
    if variant.prepare is not None:
        variant.prepare()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    variant.run()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    return {"extra_bytes": extra, "workspace_bytes": extra if variant.role == "ours" else None}


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def _trim() -> None:
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


def _cpu_growth(variant: Variant) -> dict[str, int | None]:
    from negengine.ops import cpu

    variant.run()  # starts threads, loads code, compiles
    if variant.prepare is not None:
        variant.prepare()
    if variant.backend == "cpu":
        cpu._workspaces.clear()
    _trim()
    CLEAR.write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    variant.run()
    extra = max(0, _resident("VmHWM") - before)
    return {"extra_bytes": extra, "workspace_bytes": cpu.workspace().peak if variant.backend == "cpu" else None}


def main(arguments: Sequence[str]) -> None:
    task = json.loads(arguments[0])
    torch.set_num_threads(task["threads"])
    x = Shape("", *task["sizes"]).inputs(getattr(torch, task["dtype"]), "cpu")
    found, _ = variants([x], task["matching"], **task["choice"])
    print(json.dumps({variant.name: _cpu_growth(variant) for variant in found}))


if __name__ == "__main__":
    main(sys.argv[1:])
