"""How far below the best cosine each search chooses: ``python bench/accuracy.py`` writes bench/results/accuracy.json.

Kinds of tokens that reduced precision has trouble with: heavy tails, huge channels, common parts, few or quiet channels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from negengine import ops
from negengine.environment import machine, versions
from negengine.ops import registry

Draw = Callable[[int, int, torch.Generator], Tensor]  # tokens, channels, generator; `common` parts come from the first draw
SHAPES = ((64, 64), (512, 640), (512, 1280), (512, 3072))  # source tokens, channels; twice as many reference tokens
SEEDS = 20
RESULT = Path(__file__).resolve().parent / "results" / "accuracy.json"


def normal(n: int, d: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=g)


def student(n: int, d: int, g: torch.Generator) -> Tensor:
    """Two degrees of freedom."""
    return normal(n, d, g) / torch.rand(n, d, generator=g).clamp_min(1e-6).neg().log1p().neg().sqrt()


def outlier(factor: float, share: float) -> Draw:
    """A share of the channels is larger by a factor."""

    def draw(n: int, d: int, g: torch.Generator) -> Tensor:
        x = normal(n, d, g)
        x[:, : max(1, int(d * share))] *= factor
        return x

    return draw


def common(size: float) -> Draw:
    """All tokens share a part that is larger than what tells them apart."""

    def draw(n: int, d: int, g: torch.Generator) -> Tensor:
        return size * normal(1, d, torch.Generator().manual_seed(d)) + normal(n, d, g)

    return draw


def low_rank(n: int, d: int, g: torch.Generator) -> Tensor:
    return normal(n, 4, g) @ normal(4, d, torch.Generator().manual_seed(d)) + 0.05 * normal(n, d, g)


def sparse(n: int, d: int, g: torch.Generator) -> Tensor:
    """One channel in ten, above a floor that int8 rounds away."""
    return normal(n, d, g) * (torch.rand(n, d, generator=g) < 0.1) + 0.005 * normal(n, d, g)


def spike(n: int, d: int, g: torch.Generator) -> Tensor:
    """One channel that all share; the others tell tokens apart, most of them below half a step of int8."""
    x = 0.004 * normal(n, d, g)
    x[:, 0] = 1
    return x


def spectrum(n: int, d: int, g: torch.Generator) -> Tensor:
    return normal(n, d, g) * torch.arange(1, d + 1) ** -0.5


KINDS: dict[str, Draw] = {
    "normal": normal, "Student-t": student, "outliers x 20": outlier(20, 0.01), "one channel x 300": outlier(300, 0),
    "common part x 3": common(3), "common part x 30": common(30), "low rank": low_rank, "sparse": sparse, "spike": spike,
    "spectrum": spectrum,
}  # fmt: skip


def shortfall(x: Tensor, r: Tensor, index: Tensor) -> Tensor:
    """Best cosine less the chosen one, in float64."""
    x, r = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (x, r))
    cosines = x @ r.T
    return cosines.amax(1) - cosines.gather(1, index.long()[:, None])[:, 0]


def measure(backend: str, dtype: torch.dtype, search: str, draw: Draw) -> dict[str, float]:
    """Worst shortfall and the share of tokens within 1e-6, over tokens unrelated to the reference and noisy copies of it."""
    found = []
    for n, d in SHAPES:
        for seed in range(SEEDS):
            g = torch.Generator().manual_seed(seed)
            x, r = draw(n, d, g), draw(2 * n, d, g)
            copies = r[torch.randint(0, 2 * n, (n,), generator=g)] + 0.3 * (r - r.mean(0)).std() * normal(n, d, g)
            x, r = torch.cat([x, copies]).to(dtype), r.to(dtype)
            _, index = ops.match(x[None], r, search=search, backend=backend)
            found.append(shortfall(x, r, index[0]))
    short = torch.cat(found)
    return {"worst": short.max().item(), "best_found": (short <= 1e-6).double().mean().item(), "rows": short.numel()}


def searches(backend: str, dtype: torch.dtype) -> list[str]:
    return [name for name in registry.SEARCHES if registry._BACKENDS[backend].refuses(torch.device("cpu"), dtype, name) is None]


if __name__ == "__main__":
    backend = next(name for name, missing in ops.backends().items() if missing is None)
    rows = {}
    for dtype in (torch.float32, torch.bfloat16):
        for search in searches(backend, dtype):
            name = f"{str(dtype).removeprefix('torch.')} {search}"
            rows[name] = {kind: measure(backend, dtype, search, draw) for kind, draw in KINDS.items()}
            print(name)
            for kind, row in rows[name].items():
                print(f"  {kind:20} at worst {row['worst']:.1e}, the best for {row['best_found']:.4%}", flush=True)
    about = {"date": time.strftime("%Y-%m-%d"), "backend": backend, "shapes": SHAPES, "seeds": SEEDS}
    RESULT.write_text(json.dumps(about | {"machine": machine(), "versions": versions(), "searches": rows}, indent=1) + "\n")
