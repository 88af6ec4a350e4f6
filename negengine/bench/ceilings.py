"""What the machine can do at this moment: the rate of bare products, the bandwidth of a copy, and the floor of a call from both."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from negengine.bench.shapes import Shape
from negengine.interleave import interleave

DRIFT = 0.10  # a peak that moved by more between before and after makes a case suspect
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


@dataclass(frozen=True)
class Ceilings:
    """Measured rates.

    Attributes:
        gops: precision -> billions of operations a second in a loop of nothing but products.
        copy: bytes a second of a large copy, read and written both counted.
    """

    gops: dict[str, float]
    copy: float


@dataclass(frozen=True)
class Floor:
    """Seconds that a call takes at the least: its search at the peak rate, its merge at the copy bandwidth, one after the other."""

    search: float
    merge: float

    @property
    def total(self) -> float:
        return self.search + self.merge


def floor(shape: Shape, dtype: torch.dtype, precision: str, share: float, ceilings: Ceilings) -> Floor | None:
    """The floor of a call that merges a ``share`` of its tokens; None where that precision's peak was not measured."""
    if precision not in ceilings.gops:
        return None
    return Floor(shape.search_flop / (ceilings.gops[precision] * 1e9), shape.merge_bytes(dtype, share) / ceilings.copy)


def measure(device: str) -> Ceilings:
    """Peak rates and copy bandwidth, now; a fraction of a second."""
    return Ceilings(gpu_peaks() if device == "cuda" else cpu_peaks(), copy_bandwidth(device))


def best(before: Ceilings, after: Ceilings) -> Ceilings:
    """The higher of each rate: a floor from a disturbed reading would lie above what was reached."""
    return Ceilings({name: max(rate, after.gops[name]) for name, rate in before.gops.items()}, max(before.copy, after.copy))


def drift(before: Ceilings, after: Ceilings) -> float:
    """By which fraction the peaks moved, the largest of them."""
    return max((abs(after.gops[name] / rate - 1) for name, rate in before.gops.items()), default=0.0)


@functools.cache
def _cpu_program() -> Path | None:
    """The compiled loops of kernels/cpu/tests/peak.cpp; None where the source or a compiler is missing."""
    from negengine.kernels.cpu import build

    source = build.FOLDER / "tests" / "peak.cpp"
    try:
        command = build.compiler()
    except FileNotFoundError:
        return None
    if not source.exists():
        return None
    folder = tempfile.mkdtemp(prefix="negengine-peak-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = Path(folder, "peak")
    subprocess.run([*command, "-O2", "-std=c++17", "-pthread", str(source), "-o", str(target)], check=True)
    return target


def cpu_peaks() -> dict[str, float]:
    """Pure loops of each instruction of the search, on as many threads as torch uses; empty where they cannot be compiled."""
    program = _cpu_program()
    if program is None:
        return {}
    out = subprocess.run([str(program), str(torch.get_num_threads())], capture_output=True, text=True, check=True).stdout
    rates = {name: float(rate) for name, rate in (line.split() for line in out.splitlines())}
    from negengine.kernels.cpu import library

    if library.missing() is None and not library.isa().startswith("avx512"):
        return {"fp32": rates["avx2"]} if "avx2" in rates else {}  # the loops of wider vectors are no ceiling of these
    return {name: rate for name, rate in rates.items() if name in ("fp32", "bf16", "int8")}


def gpu_peaks(size: int = 8192) -> dict[str, float]:
    """Large matrix products of random data through the vendor's library."""
    a, b = (torch.randn(size, size, device="cuda") for _ in range(2))
    peaks: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        left, right = a.to(dtype), b.to(dtype)
        peaks[name] = 2e-9 * size**3 / _seconds(lambda left=left, right=right: left @ right, rounds=3 if name == "fp32" else 10)  # type: ignore[misc]
    if torch.cuda.get_device_capability() >= (8, 9) and torch.version.hip is None:
        eighth, one = torch.float8_e4m3fn, torch.ones((), device="cuda")
        left, right = a.to(eighth), b.to(eighth)
        product = functools.partial(torch._scaled_mm, left, right.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        peaks["fp8"] = 2e-9 * size**3 / _seconds(product, rounds=10)
    return peaks


def copy_bandwidth(device: str) -> float:
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device] / _seconds(lambda: target.copy_(source), rounds=5)


def _seconds(call: Callable[[], object], rounds: int) -> float:
    """Median, after one call to warm up."""
    return interleave({"": call}, rounds=rounds, warmup=1)[""].median


def nvml() -> dict[str, Any] | None:
    """Clocks (MHz), power (mW), temperature (°C), throttling and energy (mJ) of the current GPU.

    None without one or without nvidia-ml-py.

    A reading that the driver refuses (in some virtual machines) is the text of its refusal.
    """
    try:
        import pynvml
    except ImportError:
        return None
    if not torch.cuda.is_available() or torch.version.hip:
        return None

    def read(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except pynvml.NVMLError as refusal:
            return str(refusal)

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as refusal:
        return {"refused": str(refusal)}
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID("GPU-" + str(torch.cuda.get_device_properties().uuid).removeprefix("GPU-"))
        return {
            "sm_mhz": read(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": read(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
            "power_mw": read(pynvml.nvmlDeviceGetPowerUsage, handle),
            "celsius": read(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": read(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle),
            "energy_mj": read(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle),  # since the driver was loaded
        }
    except pynvml.NVMLError as refusal:
        return {"refused": str(refusal)}
    finally:
        pynvml.nvmlShutdown()


REASONS = {  # bits of NVML's reasons, as nvml.h names them
    0x2: "clocks set by an application",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "synchronised with other GPUs",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def throttling(reasons: int | str) -> list[str]:
    """Why a GPU runs slower than it could, in words; what the driver said if it refused to tell."""
    return [reasons] if isinstance(reasons, str) else [text for bit, text in REASONS.items() if reasons & bit]


def reading(device: str) -> tuple[Ceilings, dict[str, Any]]:
    """The ceilings, and all that is known of the machine now as plain data."""
    ceilings = measure(device)
    return ceilings, asdict(ceilings) | {"nvml": nvml()}
