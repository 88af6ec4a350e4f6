"""The operators of guidance beside plain PyTorch, eager and compiled, and beside the floor: each tensor read once, written once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from negengine import ops
from negengine.bench import ceilings
from negengine.bench.variants import dtype_name
from negengine.interleave import Timing, interleave, interleave_graphs
from negengine.ops import registry
from negengine.reference import guidance as reference

LATENTS = ((4, 128, 128), (16, 128, 128))  # of SDXL, and of FLUX.1 and SD3, at 1024 x 1024
BATCHES = (1, 4, 16)
TOKENS = ((1024, 1280), (4096, 640), (4096, 3072))  # SDXL's blocks and FLUX.1's, T x D
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAG = (5.0, 2.5, 0.25)
SMALL = 2**18  # elements up to which a call is so short that more rounds cost little


@dataclass(frozen=True)
class Case:
    """One table: an operator, its shape and dtype.

    Attributes:
        passes: tensors that the operator reads and writes. plain: the same of PyTorch's operators, one after another: over
            ``passes``, the predicted ratio wherever memory bounds both. fused: the same of a compiler that fuses elementwise work
            up to each reduction.
    """

    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    passes: int
    plain: int
    fused: int

    @property
    def name(self) -> str:
        return f"{self.operator} {'x'.join(map(str, self.shape))} {dtype_name(self.dtype)}"

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Each tensor read once and written once."""
        return self.passes * self.elements * self.dtype.itemsize


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for latent in LATENTS:
            for batch in BATCHES:
                # three predictions read, the result written twice
                yield Case("guide", (batch, *latent), dtype, 5, 20, 5)
                yield Case("evidence", (batch, *latent), dtype, 5, 56, 5)
        for tokens in TOKENS:
            yield Case("nag", (1, *tokens), dtype, 3, 23, 5)


# --- what plain PyTorch would be -----------------------------------------------------------------------------------


def plain_guide(c: Tensor, n: Tensor, u: Tensor, strength: Tensor, g: Tensor) -> Tensor:
    e = u + g * (c - u)
    y = e + strength * (e - n)
    return torch.cat([y, y])


def plain_evidence(x: Tensor, y: Tensor, c: Tensor, n: Tensor, u: Tensor, m: Tensor, g: Tensor) -> Tensor:
    """In float32, as sums over an image need it."""
    x, y, c, n, u = (t.float() for t in (x, y, c, n, u))
    e = u + g * (c - u)
    mu_e, mu_n = (m[2] * (m[0] * x + m[1] * a).clamp(-1, 1) + m[3] * x for a in (e, n))
    return ((mu_e - mu_n) * ((y - mu_n) + (y - mu_e))).flatten(1).sum(1)


def plain_nag(z: Tensor, away: Tensor) -> Tensor:
    scale, tau, alpha = NAG
    g = z + (scale - 1) * (z - away)
    ratio = g.abs().sum(-1, keepdim=True) / z.abs().sum(-1, keepdim=True)
    g = g * (ratio.clamp_max(tau) / ratio)
    return alpha * g + (1 - alpha) * z


# --- measurement -------------------------------------------------------------------------------------------------


def variants(case: Case, device: str, compiled: bool) -> dict[str, Callable[[], object]]:
    """Name -> call. Ours are ``cpu`` and the like: the backends with kernels of their own that run here."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[Tensor]:
        return [torch.randn(case.shape, generator=generator).to(device, case.dtype) for _ in range(count)]

    names = [name for name, missing in ops.backends().items() if missing is None and name != "torch" and _takes(name, device, case)]
    found: dict[str, Callable[[], object]] = {}
    plain: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    if case.operator == "nag":
        z, away = draw(2)
        found |= {name: lambda name=name: ops.nag(z, away, *NAG, backend=name) for name in names}  # type: ignore[misc]
        plain, arguments = plain_nag, (z, away)
    else:
        c, n, u, x, y = draw(5)
        strength, g = (torch.full((count,), value, device=device) for count, value in ((len(c), 0.7), (1, 7.5)))
        if case.operator == "guide":
            found |= {name: lambda name=name: ops.guide(c, n, strength, u, g, copies=2, backend=name) for name in names}  # type: ignore[misc]
            plain, arguments = plain_guide, (c, n, u, reference.per_image(strength, c), g.to(c.dtype))
        else:
            means = torch.tensor(reference.means_of(0.3, 0.4), dtype=torch.float64, device=device)
            found |= {name: lambda name=name: ops.evidence(x, y, c, n, means, u, g, clip=1.0, backend=name) for name in names}  # type: ignore[misc]
            plain, arguments = plain_evidence, (x, y, c, n, u, means.float(), g)
    found["plain"] = lambda: plain(*arguments)
    if compiled:
        fused = _compiled(plain)
        found["plain + compile"] = lambda: fused(*arguments)
    return found


@functools.cache
def _compiled(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled whole: a call that could not be would raise, not run uncompiled."""
    return torch.compile(plain, dynamic=True, fullgraph=True)


def _takes(name: str, device: str, case: Case) -> bool:
    offered = registry._BACKENDS[name].guidance
    return offered is not None and offered.refuses(torch.device(device), case.dtype) is None


@torch.inference_mode()
@torch._dynamo.config.patch(recompile_limit=64)  # by batch, channels and dtype
def measure(case: Case, device: str, rounds: int = 15, compiled: bool = True) -> list[dict[str, Any]]:
    """One row a variant: seconds, ratios to the rivals, the floor in bytes and, at the bandwidth of a copy, in seconds."""
    before = ceilings.copy_bandwidth(device)
    calls = variants(case, device, compiled) | {"again": variants(case, device, False)["plain"]}
    timer = interleave_graphs if device == "cuda" else interleave
    timings: dict[str, Timing] = timer(calls, rounds=2 * rounds + 1 if case.elements <= SMALL else rounds)
    copy = max(before, ceilings.copy_bandwidth(device))
    rivals = [name for name in calls if name.startswith("plain")]
    noise = abs(timings["again"].median / timings["plain"].median - 1)
    return [
        {
            "case": case.name,
            "operator": case.operator,
            "shape": list(case.shape),
            "dtype": dtype_name(case.dtype),
            "variant": name,
            **timings[name].summary(),
            "ratio": {rival: timings[rival].median / timings[name].median for rival in rivals if rival != name},
            "predicted": {"plain": case.plain / case.passes, "plain + compile": case.fused / case.passes},
            "bytes": case.bytes,
            "copy": copy,
            "floor": case.bytes / copy,
            "floor_reached": case.bytes / copy / timings[name].median,
            "noise": noise,
        }
        for name in calls
        if name != "again"
    ]
