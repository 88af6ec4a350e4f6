"""What a call costs on the host before any token is read: checks, ``torch.library``, the choice of the backend, its arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from negengine import ops, reference
from negengine.bench.variants import ALPHA, THRESHOLD
from negengine.interleave import interleave
from negengine.ops import registry
from negengine.ops.negtome import as_alpha, as_threshold

IDLE = dataclasses.replace(registry._BACKENDS["torch"], name="nothing", run=lambda call: None)
CALLS = 1000  # in a row make one measurement: a clock's own cost and the wait for a device vanish


@torch.inference_mode()
def measure(device: str, rounds: int = 15, calls: int = CALLS) -> list[dict[str, Any]]:
    """Seconds of the host a call of :func:`negengine.ops.negtome_` on four images of 16 tokens.

    One row a backend (one that does nothing; those with kernels: a CPU also searches, a GPU only launches) and
    form of alpha and threshold: ``"tensors"`` made once, as by the plug-in, or ``"numbers"``.
    """
    x = torch.randn(4, 16, 8, device=device)
    host = reference.group_references("first", 4, 4)
    references, table = host.to(device), host.flatten().tolist()
    stats = torch.zeros(3, dtype=torch.int64, device=device)
    settings: dict[str, tuple[Any, Any]] = {
        "tensors": (as_alpha(ALPHA, x), as_threshold(THRESHOLD, x)),
        "numbers": (ALPHA, THRESHOLD),
    }
    found = [IDLE.name, *(b for b, why in ops.backends().items() if why is None and b != "torch" and _takes(b, x))]
    names = {f"{form}, {backend}": (form, backend) for form in settings for backend in dict.fromkeys(found)}

    def repeat(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                call()

        return run

    variants = {
        name: repeat(
            partial(ops.negtome_, x, references, *settings[form], stats=stats, backend=backend, disjoint=True, table=table)
        )
        for name, (form, backend) in names.items()
    }
    with registry.registered(IDLE):
        timings = interleave(variants, rounds=rounds, warmup=2)
    rows = []
    for name, (form, backend) in names.items():
        times = {key: value / calls for key, value in timings[name].summary().items() if key != "rounds"}
        rows.append({"settings": form, "backend": backend, **times, "rounds": rounds, "calls": calls})
    return rows


def _takes(backend: str, x: torch.Tensor) -> bool:
    return registry.find(backend, x.device, x.dtype, "auto")[0] is not None
