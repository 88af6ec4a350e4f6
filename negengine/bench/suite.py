"""The operator beside its rivals: cases, their measurement, one row a variant."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from negengine import ops, reference
from negengine.bench import ceilings as ceilings_
from negengine.bench.ceilings import Ceilings
from negengine.bench.memory import growth
from negengine.bench.results import Results
from negengine.bench.shapes import GATES, SCALING, SHAPES, Shape
from negengine.bench.variants import ALPHA, THRESHOLD, Variant, dtype_name, usable, variants
from negengine.interleave import Timing, interleave, interleave_graphs
from negengine.reference import MATCHINGS

AGAIN = " (again)"  # the same variant timed twice: what differs less is noise
COLD_BYTES = 192 * 2**20  # of inputs, so that a GPU's L2 (60 MB on an H200) holds none of them when its turn comes
DTYPES = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16, torch.float16, torch.float32)}
RIVAL_LIMIT = {"cpu": 2.0, "cuda": 0.1}  # seconds: a rival that takes longer leaves the scaling study


@dataclass(frozen=True)
class Case:
    """One table of results.

    Attributes:
        gate: see :meth:`negengine.bench.Shape.inputs`.
        choice: which variants, as :func:`negengine.bench.variants.variants` takes it.
    """

    shape: Shape
    dtype: torch.dtype
    matching: str = "paper"
    gate: str = "half"
    choice: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.shape.name} {dtype_name(self.dtype)} {self.matching} {self.gate}"


@dataclass(frozen=True)
class Row:
    """What was measured of one variant in one case. Times in seconds, sizes in bytes, rates in billions a second; None: unknown.

    Attributes:
        ratio, ratio_p10: of ours: rival -> the rival's median (10th percentile) over this one's; above 1, ours is faster.
        floor: ``floor_search + floor_merge``, see :class:`negengine.bench.ceilings.Floor`. floor_reached: ``floor / median``.
        gops: operations of the search over the median of the whole call. peak: of the bare loop in the same precision.
        peak_reached: ``gops / peak``.
        extra_bytes: growth of the memory during a call, new results included. workspace_bytes: what ours counts itself.
        merged_share: share of the tokens with a reference that were merged.
        noise: ``|median of the same variant timed again / median - 1|`` of the case's first variant.
        peak_drift: by which fraction the peaks differ before and after. warning: set where that exceeds 10 %.
    """

    case: str
    shape: str
    images: int
    tokens: int
    channels: int
    dtype: str
    matching: str
    gate: str
    variant: str
    role: str
    backend: str | None
    search: str | None
    precision: str
    median: float
    p10: float
    p90: float
    rounds: int
    ratio: dict[str, float]
    ratio_p10: dict[str, float]
    floor: float | None
    floor_search: float | None
    floor_merge: float | None
    floor_reached: float | None
    gops: float
    peak: float | None
    peak_reached: float | None
    extra_bytes: int | None
    workspace_bytes: int | None
    merged_share: float
    noise: float
    peak_drift: float
    warning: str | None


@dataclass(frozen=True)
class Measured:
    """A case's rows; the machine before and after it; what was left out and why."""

    rows: list[Row]
    check: dict[str, Any]
    left_out: dict[str, str]


def cases(device: str, everything: bool, shapes: Sequence[Shape] = ()) -> list[Case]:
    """Those of ``make bench``; all of them with ``everything``; those of certain ``shapes``, if any are given.

    Without both, a CPU gets what two cores do in a few minutes. Compiled rivals run in bfloat16, at the smallest shape in each
    dtype.
    """
    gpu = device == "cuda"
    found = []
    for shape in shapes or SHAPES.values():
        for dtype in DTYPES[device]:
            for matching in MATCHINGS:
                plain = matching == "paper"
                small = shape.name == "sdxl-32"
                if not (everything or shapes or gpu or small or (shape.name == "sdxl-64" and plain)):
                    continue
                compiled = plain and (small or ((everything or gpu) and dtype == torch.bfloat16))
                choice: dict[str, Any] = {"compiled": compiled}
                if not (gpu or small):
                    choice["backends"] = fused_backends(device, dtype)
                found.append(Case(shape, dtype, matching, "half", choice))
    first = next(iter(SHAPES.values()))
    gates = [gate for gate in GATES if gate != "half"] if first in (shapes or [first]) else []
    return found + [Case(first, dtype, "paper", gate, {"compiled": False}) for dtype in DTYPES[device] for gate in gates]


def left_out(device: str, everything: bool) -> list[str]:
    """Names of the cases that ``cases(device, everything)`` lacks."""
    chosen = {case.name for case in cases(device, everything)}
    return [case.name for case in cases(device, True) if case.name not in chosen]


def input_sets(case: Case, device: str) -> list[Tensor]:
    """One set on a CPU; on a GPU as many as do not fit its L2."""
    first = case.shape.inputs(case.dtype, device, gate=case.gate)
    count = 1 if device == "cpu" else max(2, math.ceil(COLD_BYTES / (first.numel() * first.element_size())))
    return [first, *(first.roll(number, dims=1).contiguous() for number in range(1, count))]


def time_variants(found: Sequence[Variant], sets: int, device: str, rounds: int, warmup: int) -> dict[str, Timing]:
    """Seconds a call."""
    clock = interleave_graphs if device == "cuda" else interleave
    prepare = {v.name: v.prepare for v in found if v.prepare is not None}
    calls = {v.name: v.run for v in found}
    again = found[0].name + AGAIN
    calls[again] = found[0].run
    if found[0].prepare is not None:
        prepare[again] = found[0].prepare
    timings = clock(calls, rounds=rounds, warmup=warmup, prepare=prepare)
    return {name: Timing(tuple(s / sets for s in timing.seconds)) for name, timing in timings.items()}


def measure(case: Case, device: str, rounds: int = 15, warmup: int = 2, memory: bool = True) -> Measured:
    """Time every variant of a case in turn, between two readings of the machine."""
    torch.compiler.reset()  # else torch.compile gives up after a handful of shapes
    if device == "cuda":
        torch.cuda.empty_cache()
    xs = input_sets(case, device)
    found, missing = variants(xs, case.matching, **case.choice)
    share = merged_share(xs[0], case.matching)
    before, first = ceilings_.reading(device)
    timings = time_variants(found, len(xs), device, rounds, warmup)
    after, last = ceilings_.reading(device)
    del xs
    grown = growth(case.shape, case.dtype, device, case.matching, **case.choice) if memory else {}
    rows = [_row(case, variant, found, timings, share, before, after, grown) for variant in found]
    return Measured(rows, {"case": case.name, "before": first, "after": last}, missing)


def record(case: Case, measured: Measured, file: Results) -> None:
    """Add a case to its file."""
    file.add(measured.rows, measured.check, {f"{case.name}: {name}": why for name, why in measured.left_out.items()})


@torch.no_grad()
def merged_share(x: Tensor, matching: str) -> float:
    stats = torch.zeros(3, dtype=torch.int64, device=x.device)
    references = reference.group_references("first", len(x), len(x)).to(x.device)
    ops.negtome_(x.clone(), references, ALPHA, THRESHOLD, stats=stats, matching=matching)
    merged, eligible, _ = stats.tolist()
    return merged / eligible


def _row(
    case: Case,
    variant: Variant,
    found: Sequence[Variant],
    timings: dict[str, Timing],
    share: float,
    before: Ceilings,
    after: Ceilings,
    grown: dict[str, dict[str, int | None]],
) -> Row:
    shape, timing = case.shape, timings[variant.name]
    bare = variant.role == "search"
    ceilings = ceilings_.best(before, after)
    floor = ceilings_.floor(shape, case.dtype, variant.precision, 0.0 if bare else share, ceilings)
    peak, gops = ceilings.gops.get(variant.precision), shape.search_flop / timing.median / 1e9
    rivals = [v.name for v in found if v.role != "ours"] if variant.role == "ours" else []
    moved = ceilings_.drift(before, after)
    return Row(
        case=case.name,
        shape=shape.name,
        images=shape.images,
        tokens=shape.tokens,
        channels=shape.channels,
        dtype=dtype_name(case.dtype),
        matching=case.matching,
        gate=case.gate,
        variant=variant.name,
        role=variant.role,
        backend=variant.backend,
        search=variant.search,
        precision=variant.precision,
        median=timing.median,
        p10=timing.percentile(10),
        p90=timing.percentile(90),
        rounds=len(timing.seconds),
        ratio={name: timings[name].median / timing.median for name in rivals},
        ratio_p10={name: timings[name].percentile(10) / timing.percentile(10) for name in rivals},
        floor=None if floor is None else floor.total,
        floor_search=None if floor is None else floor.search,
        floor_merge=None if floor is None else floor.merge,
        floor_reached=None if floor is None else floor.total / timing.median,
        gops=gops,
        peak=peak,
        peak_reached=None if peak is None else gops / peak,
        extra_bytes=grown.get(variant.name, {}).get("extra_bytes"),
        workspace_bytes=grown.get(variant.name, {}).get("workspace_bytes"),
        merged_share=share,
        noise=abs(timings[found[0].name + AGAIN].median / timings[found[0].name].median - 1),
        peak_drift=moved,
        warning=f"the peak moved by {moved:.0%} during this case" if moved > ceilings_.DRIFT else None,
    )


def scaling(
    device: str, dtype: torch.dtype, axis: str, rounds: int = 7, rival_limit: float | None = None, sizes: Sequence[Shape] = ()
) -> Iterator[Measured]:
    """Time over one size, smallest first. A rival whose next call would take longer than ``rival_limit`` seconds, or whose matrix
    more than a quarter of the memory, leaves the series, and the result says so."""
    limit = RIVAL_LIMIT[device] if rival_limit is None else rival_limit
    skip: dict[str, str] = {}
    previous: Measured | None = None
    for shape in sizes or SCALING[axis]:
        for row in previous.rows if previous else ():
            expected = row.median * shape.search_flop / (2 * (row.images - 1) * row.tokens**2 * row.channels)
            if row.role != "ours" and expected > limit:
                skip.setdefault(row.variant, f"from {shape.name} on a call would take more than {limit:g} s")
        for name, images in (("release", shape.images), ("lean", shape.images - 1), ("gemm", shape.images - 1)):
            if images * shape.tokens**2 * dtype.itemsize > memory_bytes(device) / 4:
                skip.setdefault(name, f"from {shape.name} on its matrix would take more than a quarter of the memory")
        choice = {"compiled": False, "skip": [*skip, "flash-kmeans"], "backends": fused_backends(device, dtype)}
        measured = measure(Case(shape, dtype, choice=choice), device, rounds=rounds, warmup=1, memory=False)
        previous = Measured(measured.rows, measured.check, {f"{axis} {name}": reason for name, reason in skip.items()})
        yield previous


def fused_backends(device: str, dtype: torch.dtype) -> list[str]:
    """The backends with kernels of their own that run here; PyTorch's if there is none."""
    found = [name for name, _ in usable(device, dtype) if name != "torch"]
    return list(dict.fromkeys(found)) or ["torch"]


def memory_bytes(device: str) -> float:
    """Free on a GPU, installed on a CPU (its free memory is mostly cache)."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
