"""``negengine verify``: let the Triton kernels prove themselves on this machine's GPUs, before anything has to wait for it."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from negengine import ops
from negengine.cli.errors import one_line_errors

DTYPES = ("bfloat16", "float16")


@one_line_errors
def verify(
    dtype: Annotated[list[str] | None, typer.Option(help="Of the tokens; may be repeated.")] = None,
    search: Annotated[str, typer.Option(help="How the best token is searched.")] = "auto",
    matching: Annotated[str, typer.Option(help="paper or release.")] = "paper",
    force: Annotated[bool, typer.Option("--force", help="Prove anew what is known.")] = False,
) -> None:
    """Prove the Triton kernels on every GPU: right against float64, fast against the fallback. The verdicts are kept."""
    console, unsettled = Console(), False
    table = Table("device", "dtype", "verdict", "age", "details", title="Triton kernels")
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    for device in devices:
        for name in dtype or DTYPES:
            verdict = ops.verify(device, dtype_named(name), search, matching, mode="force" if force else None)
            unsettled |= verdict.kind in ("wrong", "unknown")
            details = [verdict.reason, f"{verdict.cases} cases right" if verdict.right else "", *map(str, verdict.speeds)]
            table.add_row(device, name, verdict.kind, verdict.age, "\n".join(filter(None, details)))
    console.print(table)
    if unsettled:
        raise typer.Exit(1)


def dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"there is no dtype {name!r}; the kernels take float16, bfloat16 and float32")
    return dtype
