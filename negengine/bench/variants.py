"""Every way of computing one call: ours with each backend and search, and the rivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from negengine import ops, reference
from negengine.bench import rivals
from negengine.ops import cpu, registry

ALPHA, THRESHOLD = 0.9, 0.65


@dataclass(frozen=True)
class Variant:
    """One way of computing a call.

    Attributes:
        role: ``"ours"``, ``"rival"`` (computes the same), or ``"search"`` (a rival that searches and merges nothing).
        precision: of the products of its search.
        run: the call on every set of inputs, one result each.
        prepare: what must be done before ``run``, outside of the time.
        backend, search: of ours.
    """

    name: str
    role: str
    precision: str
    run: Callable[[], list[Tensor]]
    prepare: Callable[[], None] | None = None
    backend: str | None = None
    search: str | None = None


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def precision(backend: str, dtype: torch.dtype, search: str) -> str:
    """In what the products of a search are formed."""
    if backend == "cpu":
        return cpu.precision(dtype, search)
    if search in ("auto", "exact"):
        return dtype_name(dtype) if backend == "triton" else "fp32"
    return search


def ours(xs: Sequence[Tensor], matching: str, backend: str, search: str) -> Variant:
    """The operator as the plug-in calls it: in place, on a tensor that exists, with tensors made once a run."""
    x = xs[0]
    ys = [x.clone() for x in xs]
    references = reference.group_references("first", len(x), len(x))
    table, entries, disjoint = references.to(x.device), references.flatten().tolist(), reference.is_disjoint(references)
    alpha = torch.full((len(x),), ALPHA, dtype=torch.float64, device=x.device)
    threshold = torch.full((1,), THRESHOLD, dtype=torch.float64, device=x.device)
    stats = torch.zeros(3, dtype=torch.int64, device=x.device)

    def restore() -> None:
        for x, y in zip(xs, ys, strict=True):
            y.copy_(x)

    def run() -> list[Tensor]:
        names = {"matching": matching, "search": search, "backend": backend, "disjoint": disjoint, "table": entries}
        return [ops.negtome_(y, table, alpha, threshold, stats=stats, **names) for y in ys]  # type: ignore[arg-type]

    return Variant(f"{backend} {search}", "ours", precision(backend, x.dtype, search), run, restore, backend, search)


def usable(device: str, dtype: torch.dtype, only: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """``(backend, search)`` of every call that this machine can take; of searches that come to the same, the first."""
    found: dict[tuple[str, str], str] = {}
    for name, missing in ops.backends().items():
        if missing is not None or name not in (only or ops.backends()):
            continue
        for search in registry.SEARCHES:
            if registry._BACKENDS[name].refuses(torch.device(device), dtype, search) is None:
                found.setdefault((name, precision(name, dtype, search)), search)
    return [(name, search) for (name, _), search in found.items()]


def variants(
    xs: Sequence[Tensor],
    matching: str,
    backends: Sequence[str] | None = None,
    compiled: bool = True,
    skip: Sequence[str] = (),
) -> tuple[list[Variant], dict[str, str]]:
    """Ours, those preferred first, then the rivals; and which rivals are left out, with the reason.

    Args:
        xs: sets of inputs ``[N, T, D]`` of one shape and dtype.
        backends: of ours; all usable ones if None.
        compiled: also the rivals under ``torch.compile``.
        skip: names that are not to be made.
    """
    x, left_out = xs[0], {}
    device, dtype = x.device.type, x.dtype
    found = [ours(xs, matching, *pair) for pair in usable(device, dtype, backends) if f"{pair[0]} {pair[1]}" not in skip]

    def rival(name: str, function: Callable[[Tensor], Tensor], role: str = "rival") -> None:
        if name not in skip:
            found.append(Variant(name, role, dtype_name(dtype), lambda: [function(x) for x in xs]))

    plain = {"release": rivals.release, "lean": rivals.lean}
    for name, function in plain.items():
        rival(name, lambda x, function=function: function(x, ALPHA, THRESHOLD, matching))  # type: ignore[misc]
        if compiled and f"{name} + compile" not in skip:
            fast = torch.compile(function, fullgraph=True, dynamic=False)
            rival(f"{name} + compile", lambda x, fast=fast: fast(x, ALPHA, THRESHOLD, matching))  # type: ignore[misc]
        elif not compiled:
            left_out[f"{name} + compile"] = "compiled at the smallest shape, and with --all-cases in bfloat16 at every shape"
    rival("gemm", rivals.gemm, "search")
    missing = rivals.flash_kmeans_missing(device)
    if missing is None and matching == "paper" and "flash-kmeans" not in skip:
        assignments = [rivals.flash_kmeans(x) for x in xs]
        found.append(Variant("flash-kmeans", "search", dtype_name(dtype), lambda: [assign() for assign in assignments]))
    else:
        left_out["flash-kmeans"] = missing or "searches the reference for each source, as the paper does, not the other way round"
    return found, left_out
