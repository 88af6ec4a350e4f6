"""``negengine doctor``: what is installed, what works, and whether it computes the right thing."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from negengine import ops, reference
from negengine.environment import machine, versions
from negengine.kernels.cpu import library
from negengine.ops import cpu, guidance_check, registry

DELTAS = {
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}  # by how much the chosen token may be less similar than the best


def doctor(seed: Annotated[int, typer.Option(help="Seed of the self-test.")] = 0) -> None:
    """Versions, devices, backends, and a self-test of every backend against the float64 oracle."""
    console = Console()
    about = Table("what", "value", title="negengine doctor")
    for name, version in versions().items():
        about.add_row(name, version or "not installed")
    for key, value in machine().items():
        about.add_row(key, ", ".join(value) or "none" if isinstance(value, list) else str(value))
    if library.missing() is None:
        about.add_row("cpu kernels", library.isa())
        auto = (f"{dtype_name(dtype)} in {cpu.precision(dtype, 'auto')}" for dtype in DELTAS)
        about.add_row("cpu search='auto'", ", ".join(auto))
        about.add_row("cpu threads", "torch's" if cpu.parallel_of_torch() else "their own: torch has no OpenMP runtime to share")
    for gpu in range(torch.cuda.device_count()):
        for dtype in (torch.bfloat16, torch.float16):
            about.add_row(f"triton kernels, cuda:{gpu}, {dtype_name(dtype)}", kernels_on(torch.device("cuda", gpu), dtype))
    console.print(about)

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    tests = Table("backend", "device", "dtype", "search", "result", title="NegToMe against the float64 oracle")
    guidance = Table("backend", "device", "dtype", "result", title="guide, evidence and nag against float64")
    failed = False
    for backend, reason in ops.backends().items():
        if reason is not None:
            tests.add_row(backend, "", "", "", f"not usable: {reason}")
            continue
        for device in devices:
            for dtype in DELTAS:
                for search in registry.SEARCHES:
                    if registry._BACKENDS[backend].refuses(torch.device(device), dtype, search) is None:
                        fault = self_test(backend, device, dtype, seed, search)
                        failed |= fault is not None
                        tests.add_row(backend, device, dtype_name(dtype), search, "ok" if fault is None else f"FAILED: {fault}")
                operators = registry._BACKENDS[backend].guidance
                if operators is not None and operators.refuses(torch.device(device), dtype) is None:
                    fault = guidance_check.wrong(torch.device(device), dtype, backend)
                    failed |= fault is not None
                    guidance.add_row(backend, device, dtype_name(dtype), "ok" if fault is None else f"FAILED: {fault}")
    console.print(tests)
    console.print(guidance)
    if failed:
        raise typer.Exit(1)


def kernels_on(device: torch.device, dtype: torch.dtype) -> str:
    """What is known of the Triton kernels on a GPU, and since when; proves nothing."""
    reason = registry.find("triton", device, dtype, "auto")[1]
    return reason[0] if reason else str(ops.verify(device, dtype, mode="off"))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def self_test(backend: str, device: str, dtype: torch.dtype, seed: int, search: str = "auto") -> str | None:
    """None if a backend keeps the numeric contract on a random input, else what it broke."""
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(200, 96, generator=generator)
    x = r[torch.randperm(200, generator=generator)[:150]] + 0.8 * torch.randn(150, 96, generator=generator)
    x, r = x.to(device, dtype)[None], r.to(device, dtype)
    mask = torch.rand(200, generator=generator).to(device) > 0.2
    exact_x, exact_r = x[0].double(), r.double()
    cosines = reference.cosine(exact_x, exact_r).masked_fill(~mask, -torch.inf)
    _, index = ops.match(x, r, mask, backend=backend, search=search)
    chosen = cosines.gather(1, index[0].long()[:, None])[:, 0]
    worst = float((cosines.amax(1) - chosen).max())
    allowed = DELTAS[dtype] if search in ("auto", "exact") else 1e-2
    if worst > allowed:
        return f"a chosen token's cosine is {worst:.1e} below the best, {allowed:.0e} is allowed"
    y = ops.negtome(x, r, alpha=0.9, threshold=-1, mask=mask, backend=backend, search=search)[0].double()
    expected = reference.merge(exact_x, exact_r, index[0].long(), 0.9, torch.ones_like(chosen, dtype=torch.bool))
    torch_error = (
        reference.merge(x[0], r, index[0].long(), 0.9, torch.ones_like(chosen, dtype=torch.bool)).double() - expected
    ).abs()
    ulp = torch.finfo(dtype).eps * expected.abs()
    if bool(((y - expected).abs() > torch_error + ulp).any()):
        return "a merged token is further from the oracle than torch's own arithmetic"
    return None
