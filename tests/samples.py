"""Result files as the benchmarks write them, with numbers of the size that a GPU gives."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from negengine.bench.suite import Row
from negengine.interleave import Timing

MACHINE = {"system": "Linux x86_64", "processor": "A processor", "cores": 2, "threads": 2, "gpus": []}
VERSIONS = {"python": "3.11.7", "negengine": "0.1.0", "torch": "2.13.0", "triton": None}
H100 = {
    "isa": None,
    "machine": MACHINE | {"cores": 16, "threads": 16, "gpus": ["NVIDIA H100 80GB HBM3"]},
    "versions": VERSIONS | {"torch": "2.11.0", "triton": "3.6.0", "diffusers": "0.40.0", "xformers": None},
}
CASE = "flux-dev 2+2 1024 x 1024, 2 images, bf16, 4 steps"
HOW = "the measured share of an active step, times 7 of 25 steps, over the measured time of 19 and 38 blocks"

Content = dict[str, Any]


def document(what: str, rows: Any, **changes: Any) -> Content:
    top = {"schema": 1, "what": what, "date": "2026-11-26", "isa": "avx2", "machine": MACHINE, "versions": VERSIONS}
    return copy.deepcopy({**top, "left_out": {}, "checks": [], "rows": rows} | changes)


def timing(median: float, spread: float = 0.02) -> dict[str, float]:
    """Of a row whose percentiles are a share away from its median."""
    return {"median": median, "p10": median * (1 - spread), "p90": median * (1 + spread)}


def operator_row(variant: str = "cpu auto", median: float = 0.01, spread: float = 0.02, **changes: Any) -> Content:
    role = "ours" if variant.startswith(("cpu", "torch", "triton")) else "rival"
    row = Row(
        case="sdxl-32 bf16 paper half", shape="sdxl-32", images=4, tokens=1024, channels=1280, dtype="bf16", matching="paper",
        gate="half", variant=variant, role=role, backend=variant.split()[0] if role == "ours" else None, search=None,
        precision="bf16", **timing(median, spread), rounds=15, ratio={"release": 4.0} if role == "ours" else {}, ratio_p10={},
        floor=0.008, floor_search=0.007, floor_merge=0.001, floor_reached=0.8, gops=600.0, peak=None, peak_reached=None,
        extra_bytes=-4096, workspace_bytes=None, merged_share=0.5, noise=0.01, peak_drift=0.02, warning=None,
    )  # fmt: skip
    return asdict(row) | changes


def measured_row(variant: str, role: str, rounds: list[list[float]], acts: list[bool], over: float, **changes: Any) -> Content:
    """A row of `negengine bench model` from the seconds of its steps; ``over``: what its loop takes more than its base."""
    without = role == "without"
    loops = Timing(tuple(map(sum, rounds)))
    seconds = {
        wanted: [s for steps in rounds for s, active in zip(steps, acts, strict=True) if active == wanted]
        for wanted in (True, False)
    }
    medians = {wanted: Timing(tuple(found)).median if found else None for wanted, found in seconds.items()}
    row = {
        "case": CASE, "model": "flux-dev", "depth": "2+2", "size": 1024, "images": 2, "dtype": "bf16", "steps": len(acts),
        "variant": variant, "role": role, "method": None if without else "negtome", "compiled": None, "attention": "native",
        **loops.summary(), "active": acts, "step_seconds": rounds, "active_step": medians[True], "inactive_step": medians[False],
        "overhead": over, "overhead_p10": over - 0.002 * (not without), "overhead_p90": over + 0.003 * (not without),
        "noise": 0.0031, "overhead_active_step": over * len(acts) / sum(acts) if any(acts) else None, "full": None,
        "merged_share": None if without else 0.51, "peak_bytes": None, "computed_bytes": 23_100_000_000, "gpu": None,
        "text_encoders": False, "vae": False, "graphs": None,
    }  # fmt: skip
    return row | changes


def model_row(variant: str = "without", loops: tuple[float, ...] = (13.0, 13.2, 13.1), **changes: Any) -> Content:
    """Of a loop of two steps, the first of which is active."""
    without = variant.startswith("without")
    rounds = [[0.6 * loop, 0.4 * loop] for loop in loops]
    over = 0.0 if without else 0.02
    return measured_row(variant, "without" if without else "ours", rounds, [not without, False], over, **changes)


def loop(
    variant: str, role: str = "ours", share: float = 0.0, base: float = 0.1, steps: int = 4, active: int = 2, **changes: Any
) -> Content:
    """A row whose steps take ``base`` seconds each, active ones ``share`` more."""
    acts = [role != "without" and step < active for step in range(steps)]
    rounds = [
        [
            base * (1 + share * act) * (1 + 0.004 * math.sin(7 * turn + 3 * step) + 0.006 * math.sin(2 * turn + len(variant)))
            for step, act in enumerate(acts)
        ]
        for turn in range(5)
    ]
    memory = {"peak_bytes": 23_400_000_000 + (0 if role == "without" else int(9e8 * share))}
    return measured_row(variant, role, rounds, acts, share * active / steps, **memory | changes)


def full(share, without=13.05):
    added = share * 7 / 25
    whole = {"depth": "full", "steps": 25, "active": 7, "without": without, "loop": without * (1 + added), "overhead": added}
    return whole | {"how": HOW}


def gpu(energy):
    return {"clock_mhz": 1710, "power_w": 688.0, "temperature_c": 64, "throttling": ["power cap"], "energy_j_per_image": energy}


def flux(**other):
    """The variants of one case."""
    rows = [
        loop("without", "without", gpu=gpu(2950.0)),
        loop("triton auto", share=0.041, full=full(0.041), gpu=gpu(2984.0)),
        loop("torch auto", share=0.122, full=full(0.122), gpu=gpu(3060.0)),
        loop("published", "published", share=0.124, full=full(0.124), gpu=gpu(3071.0)),
        loop("dng", share=1.03, method="dng", merged_share=None),
        loop("nag", share=0.31, method="nag", merged_share=None),
        loop("without, blocks", "without", base=0.081, compiled="blocks", graphs={"graphs": 4, "recompiles": 0}),
        loop("triton auto, blocks", share=0.094, base=0.081, compiled="blocks", graphs={"graphs": 4, "recompiles": 0}),
        loop("published, blocks", "published", share=0.21, base=0.081, compiled="blocks", graphs={"graphs": 6, "recompiles": 1}),
    ]
    return [row | other for row in rows]


def scaled(images, size):
    """The three main variants where images or size differ."""
    more = images / 2 * (size / 1024) ** 2
    name = {"case": f"flux-dev 2+2 {size} x {size}, {images} images, bf16, 4 steps", "images": images, "size": size}
    shares = {"triton auto": 0.03 + 0.006 * math.log2(1 + more), "published": 0.1 + 0.02 * math.log2(1 + more)}
    return [
        loop("without", "without", base=0.1 * more, **name),
        loop("triton auto", share=shares["triton auto"], base=0.1 * more, full=full(shares["triton auto"], 13.05 * more), **name),
        loop(
            "published",
            "published",
            share=shares["published"],
            base=0.1 * more,
            full=full(shares["published"], 13.05 * more),
            **name,
        ),
    ]


def models(**other):
    """A file with several cases: images and resolution scaled, a whole SDXL, a machine's gaps."""
    sdxl = {
        "case": "sdxl-base full 1024 x 1024, 2 images, fp16, 25 steps, with VAE",
        "model": "sdxl-base",
        "depth": "full",
        "dtype": "fp16",
        "vae": True,
    }
    rows = [
        *flux(),
        *(row for images, size in ((4, 1024), (8, 1024), (2, 512), (2, 1536)) for row in scaled(images, size)),
        loop("without", "without", base=0.142, steps=25, **sdxl),
        loop("triton auto", share=0.042, base=0.142, steps=25, active=7, **sdxl),
        loop("published", "published", share=0.183, base=0.142, steps=25, active=7, **sdxl),
    ]
    gaps = H100 | {
        "left_out": {"flux-dev whole": "57 blocks need 24 GB more than are free", "xformers": "xformers is not installed"}
    }
    return document("model", rows, **gaps | other)


def operator(**other):
    shape = {"case": "flux-1024 bf16 paper half", "shape": "flux-1024", "tokens": 4096, "channels": 3072}
    unknown = {"floor_reached": None, "floor": None}
    rows = [
        operator_row(
            "triton auto", 482.1e-6, ratio={"release": 3.124, "lean": 2.025, "gemm": 0.83}, floor_reached=0.916, extra_bytes=598528
        ),
        operator_row("release", 1506e-6, **unknown, extra_bytes=206_000_000),
        operator_row("lean", 976e-6, **unknown, extra_bytes=154_000_000),
        operator_row("gemm", 400e-6, role="search", floor_reached=0.98, extra_bytes=None),
    ]
    return document("operator", [row | shape for row in rows], **H100 | other)


def written(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path
