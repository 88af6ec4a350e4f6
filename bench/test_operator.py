"""The operator beside its rivals, every variant in turn within one run."""

import pytest
import torch

from negengine import ops, reference
from negengine.bench import SHAPES, gemm, interleave, lean, release
from negengine.cli.environment import machine, versions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALPHA, THRESHOLD = 0.9, 0.65
SLOW_ON_CPU = {"flux-1024"}


def usable_backends():
    return [name for name, reason in ops.backends().items() if reason is None]


@pytest.mark.parametrize("matching", ["paper", "release"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_call(benchmark, request, shape, dtype, matching):
    if DEVICE == "cpu" and shape.name in SLOW_ON_CPU and not request.config.getoption("--all-shapes"):
        pytest.skip("takes minutes on a CPU; --all-shapes runs it")
    x = shape.inputs(dtype, DEVICE)
    references = reference.group_references("first", shape.images, shape.images).to(DEVICE)
    stats = torch.zeros(3, dtype=torch.int64, device=DEVICE)

    def ours(backend):
        y = x.clone()
        return lambda: ops.negtome_(y.copy_(x), references, ALPHA, THRESHOLD, stats=stats, matching=matching, backend=backend)

    variants = {f"negengine {name}": ours(name) for name in usable_backends()}
    first = next(iter(variants))
    variants |= {
        "release": lambda: release(x, ALPHA, THRESHOLD, matching),
        "lean": lambda: lean(x, ALPHA, THRESHOLD, matching),
        "gemm": lambda: gemm(x),
    }
    benchmark.pedantic(variants[first], rounds=1, warmup_rounds=0)  # the suite's own row; the figures are below
    stats.zero_()
    variants[first]()
    timings = interleave(variants, rounds=15 if shape.search_flop < 7e10 else 7)
    merged, eligible, _ = stats.tolist()
    benchmark.extra_info |= {
        "seconds": {name: timing.summary() for name, timing in timings.items()},
        "ratio": {name: timings[name].median / timings[first].median for name in timings if name != first},
        "gflop": shape.search_flop / 1e9,
        "merged_share": merged / eligible,
        "machine": machine(),
        "versions": versions(),
    }
