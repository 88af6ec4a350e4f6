"""How often each matching finds the true partner: ``python bench/matching.py`` writes bench/results/matching.json.

The reference is a permuted, noised copy of the source, so the partner of every token is known.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from negengine import reference
from negengine.environment import machine, versions

TOKENS, CHANNELS, SEEDS = 1024, 640, 5
RESULT = Path(__file__).resolve().parent / "results" / "matching.json"


def found(matching: str, noise: float, seed: int) -> float:
    """Share of tokens whose match is their true partner."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, CHANNELS, generator=generator, dtype=torch.float64)
    order = torch.randperm(TOKENS, generator=generator)
    r = x[order] + noise * torch.randn(TOKENS, CHANNELS, generator=generator, dtype=torch.float64)
    _, index = reference.match(x, r, matching=matching)
    return float((index == order.argsort()).double().mean())


if __name__ == "__main__":
    shares = {
        matching: {str(noise): sum(found(matching, noise, seed) for seed in range(SEEDS)) / SEEDS for noise in (0.3, 0.5, 1.0)}
        for matching in reference.MATCHINGS
    }
    about = {"date": time.strftime("%Y-%m-%d"), "tokens": TOKENS, "channels": CHANNELS, "seeds": SEEDS}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(about | {"machine": machine(), "versions": versions(), "found": shares}, indent=1) + "\n")
    for matching, by_noise in shares.items():
        print(matching, {noise: f"{share:.2%}" for noise, share in by_noise.items()})
