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
DTYPE_HELP = "Of the tokens; may be repeated. bfloat16 and float16 if left out."
SHAPE_HELP = (
    "Of calls to be timed: images, source and reference tokens, channels; may be repeated. Those of real models if left out."
)


@one_line_errors
def verify(
    dtype: Annotated[list[str] | None, typer.Option(help=DTYPE_HELP)] = None,
    shape: Annotated[list[str] | None, typer.Option(metavar="B,T,M,D", help=SHAPE_HELP)] = None,
    search: Annotated[str, typer.Option(help="How the best token is searched.")] = "auto",
    matching: Annotated[str, typer.Option(help="paper or release.")] = "paper",
    force: Annotated[bool, typer.Option("--force", help="Prove anew what is known.")] = False,
) -> None:
    """Prove the Triton kernels on every GPU: right against float64, fast against the fallback. The verdicts are kept."""
    shapes, mode = [sizes(text) for text in shape] if shape else None, "force" if force else None
    table, unsettled = Table("device", "dtype", "verdict", "age", "details", title="Triton kernels"), False
    for device in [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]:
        for name in dtype or DTYPES:
            verdict = ops.verify(device, dtype_named(name), search, matching, shapes, mode)
            unsettled |= verdict.kind in ("wrong", "unknown")
            details = [verdict.reason, f"{verdict.cases} cases are right" if verdict.right else "", *map(str, verdict.speeds)]
            table.add_row(device, name, verdict.kind, verdict.age, "\n".join(filter(None, details)))
    Console().print(table)
    if unsettled:
        raise typer.Exit(1)


def sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise ValueError(f"a shape is B,T,M,D, as in 4,4096,4096,3072; got {text!r}") from None


def dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"there is no dtype {name!r}; the kernels take float16, bfloat16 and float32")
    return dtype
