"""GPUs as the static model sees them. Every number is an assumption, taken from public sources; none was measured here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

GIGA = 1e9


@dataclass(frozen=True)
class Latencies:
    """Cycles from issue to result.

    Jia and others, "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking" (2018), and Luo and others,
    "Benchmarking and Dissecting the NVIDIA Hopper GPU Architecture via Microbenchmarking" (2024), give 22 to 33 for shared
    memory and shuffles, 200 to 280 for the L2 cache, 470 to 680 for memory; they differ little since Volta, so that one set
    serves all architectures here.
    """

    near: int = 40  # a load that the processor's own cache serves
    shared: int = 30
    special: int = 24  # reciprocals, conversions, shuffles, moves between the uniform and the ordinary registers
    cache: int = 260  # a load that the L2 cache serves
    memory: int = 600
    copy: int = 700  # an asynchronous copy of a tile, from issue to the first byte that can be multiplied
    tensor: int = 40  # a matrix instruction whose operands come from registers; a load from tensor memory
    barrier: int = 20  # of a block
    operands: int = 10  # until an instruction of variable duration has read its registers


@dataclass(frozen=True)
class Machine:
    """A GPU.

    Attributes:
        architecture: of the kernels' configurations.
        results: what the folder of its results under ``bench/results`` contains in its name.
        processors: multiprocessors.
        clock: cycles per second under a sustained load of the matrix units, which the power limit keeps below the advertised boost.
        products: operations per cycle and processor of the matrix units, dense, summed in float32 (int32 for int8).
        vector: float32 lanes of a scheduler; a warp takes ``32 / vector`` cycles.
        integer: lanes of a scheduler for integers, comparisons, minima and maxima.
        memory, cache: bytes per second of device memory, and of the L2 cache to all processors.
        registers, shared, blocks: of a processor: 32-bit registers, bytes of shared memory, resident blocks at most.
        launch: seconds from the end of a kernel to the work of the next, in a graph.
        sustained: share of ``products`` that a well-made main loop reaches.
        streamed: share of ``memory`` that a kernel reaches which only reads and writes.
        schedulers: of a processor, each of which issues one instruction per cycle.
    """

    name: str
    architecture: str
    results: str
    processors: int
    clock: float
    products: dict[str, int]
    vector: int
    integer: int
    memory: float
    cache: float
    shared: int
    blocks: int
    registers: int = 65536
    # CUTLASS and cuBLAS reach 0.85 to 0.95 of the peak at the clock that they run at, less what the last round of tiles leaves idle
    sustained: float = 0.93
    streamed: float = 0.90
    launch: float = 1.5e-6
    schedulers: int = 4
    latencies: Latencies = field(default_factory=Latencies)

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            numbers = value.values() if isinstance(value, dict) else [value] if isinstance(value, int | float) else []
            for number in numbers:
                if not (math.isfinite(number) and number > 0):
                    raise ValueError(f"{self.name}: {one.name} must be positive and finite, not {number}")
        for share in ("sustained", "streamed"):
            if getattr(self, share) > 1:
                raise ValueError(f"{self.name}: {share} is a share of the peak, so at most 1, not {getattr(self, share)}")
        if not self.products:
            raise ValueError(f"{self.name}: products names no dtype; give the operations per cycle and processor of each")

    def peak(self, dtype: str) -> float:
        """Operations per second of all matrix units."""
        if dtype not in self.products:
            raise ValueError(f"{self.name} has no matrix units for {dtype}, only for {', '.join(self.products)}")
        return self.products[dtype] * self.processors * self.clock


def _floats(half: int, **quantised: int) -> dict[str, int]:
    return {"bf16": half, "fp16": half} | quantised


MACHINES = {
    machine.name: machine
    for machine in (
        # NVIDIA A100 whitepaper: 312 TFLOP/s dense at 1.41 GHz, 624 TOP/s int8, 2,039 GB/s (80 GB), 164 KiB.
        # The L2 cache: 5,120 bytes per cycle
        Machine(
            "A100 SXM", "sm_80", "a100", 108, 1.35e9, _floats(2048, int8=4096),
            vector=16, integer=16, memory=2039 * GIGA, cache=5120 * 1.35e9, shared=164 * 1024, blocks=32,
        ),
        # NVIDIA GA102 whitepaper and RTX A6000 data sheet: 155 TFLOP/s dense at 1.80 GHz, 310 TOP/s int8, 768 GB/s, 100 KiB.
        # The L2 cache: 32 bytes per cycle from each of 96 slices
        Machine(
            "RTX A6000", "sm_86", "a6000", 84, 1.65e9, _floats(1024, int8=2048),
            vector=32, integer=16, memory=768 * GIGA, cache=3072 * 1.65e9, shared=100 * 1024, blocks=16,
        ),
        # NVIDIA Ada whitepaper, RTX 4090: 165 TFLOP/s dense with float32 sums at 2.52 GHz, 330 in fp8, 661 TOP/s int8,
        # 1,008 GB/s, 100 KiB. The L2 cache: about 5 TB/s, as reported from microbenchmarks
        Machine(
            "RTX 4090", "sm_89", "4090", 128, 2.52e9, _floats(512, fp8=1024, int8=2048),
            vector=32, integer=16, memory=1008 * GIGA, cache=5.0e12, shared=100 * 1024, blocks=24,
        ),
        # NVIDIA H100 whitepaper: 989 TFLOP/s dense at 1.83 GHz, 1,979 in fp8 and int8, 3.35 TB/s, 228 KiB. The clock is that at
        # which cuBLAS reaches the 0.7 to 0.75 PFLOP/s that are reported for random operands at 700 W. The L2 cache: 5,120 bytes
        # per cycle, as in the A100, at the boost clock: the model's least certain number for this GPU
        Machine(
            "H100 SXM", "sm_90", "h100", 132, 1.55e9, _floats(4096, fp8=8192, int8=8192),
            vector=32, integer=16, memory=3350 * GIGA, cache=5120 * 1.755e9, shared=228 * 1024, blocks=32,
        ),
        # NVIDIA H200 data sheet: the processors of the H100 with 4.8 TB/s; at the same 700 W
        Machine(
            "H200 SXM", "sm_90", "h200", 132, 1.55e9, _floats(4096, fp8=8192, int8=8192),
            vector=32, integer=16, memory=4800 * GIGA, cache=5120 * 1.755e9, shared=228 * 1024, blocks=32,
        ),
        # NVIDIA Blackwell architecture brief: 2.25 PFLOP/s dense, so 8,192 operations of each processor at 1.85 GHz, 4.5 in fp8,
        # 8 TB/s, 228 KiB. The clock and the L2 cache are taken to scale as on the H100
        Machine(
            "B200", "sm_100", "b200", 148, 1.60e9, _floats(8192, fp8=16384),
            vector=32, integer=16, memory=8000 * GIGA, cache=10240 * 1.8e9, shared=228 * 1024, blocks=32,
        ),
        # NVIDIA RTX Blackwell whitepaper, RTX 5090: 210 TFLOP/s dense with float32 sums at 2.41 GHz, 419 in fp8, 838 TOP/s int8,
        # 1,792 GB/s, 100 KiB; integers on all 32 lanes. The L2 cache is taken to be as fast for each processor as the 4090's
        Machine(
            "RTX 5090", "sm_120", "5090", 170, 2.40e9, _floats(512, fp8=1024, int8=2048),
            vector=32, integer=32, memory=1792 * GIGA, cache=6.6e12, shared=100 * 1024, blocks=24,
        ),
    )
}  # fmt: skip
