"""``negengine bench operator``: one call of NegToMe beside its rivals, at the shapes of real models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from negengine.bench import suite
from negengine.bench.compare import OtherMachine, check_machine
from negengine.bench.results import Results, omissions, read, table
from negengine.bench.shapes import SHAPES, shape_named
from negengine.bench.variants import dtype_name
from negengine.cli.errors import one_line_errors
from negengine.reference import MATCHINGS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED = ("release + compile", "lean + compile")
SHAPE_HELP = (
    f"{', '.join(SHAPES)}, or IMAGESxTOKENSxCHANNELS such as 4x1024x640; may be repeated. Those of `make bench` if left out."
)


@one_line_errors
def operator(
    output: Annotated[Path, typer.Option(help="Folder of the results; its operator.json is written anew.")],
    shape: Annotated[list[str] | None, typer.Option(help=SHAPE_HELP)] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp16 or fp32; may be repeated. All if left out.")] = None,
    matching: Annotated[list[str] | None, typer.Option(help="paper or release; may be repeated. Both if left out.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of every measurement.")] = 15,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also the rivals under torch.compile: minutes.")] = True,
    same_machine_as: Annotated[
        Path | None, typer.Option(help="A result file; on a machine unlike its own nothing is measured.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="A CPU too: every shape and compiled rival; plan an hour.")] = False,
) -> None:
    """Time one call of NegToMe and of its rivals, in turn: median, 10th and 90th percentile, ratios, memory."""
    cases = chosen(shape or [], dtype or [], matching or [], everything)
    other = None if same_machine_as is None else read(same_machine_as)
    output.mkdir(parents=True, exist_ok=True)
    file = Results(output / "operator.json", "operator")
    left_out = [] if shape or dtype or matching else suite.left_out(DEVICE, everything)
    file.add([], left_out=dict.fromkeys(left_out, "takes minutes on a CPU; --all has it"))
    if other is not None:
        try:
            check_machine(other, file.document)
        except OtherMachine as reason:
            typer.echo(f"nothing measured that could be compared with {same_machine_as}: {reason}")
            return
    for case in cases:
        typer.echo(f"measuring {case.name}")
        if not compiled and case.choice["compiled"]:
            case = replace(case, choice=case.choice | {"skip": COMPILED})
            file.add([], left_out=dict.fromkeys((f"{case.name}: {name}" for name in COMPILED), "--no-compile leaves it out"))
        suite.record(case, suite.measure(case, DEVICE, rounds), file)
    typer.echo("the operator: theirs / ours at the end of our lines")
    typer.echo(table(file.document["rows"]))
    if file.document["left_out"]:
        typer.echo(f"left out:\n{omissions(file.document['left_out'])}")
    typer.echo(f"wrote {file.path}")


def chosen(shapes: list[str], dtypes: list[str], matchings: list[str], everything: bool) -> list[suite.Case]:
    """The study's cases that agree with all that is named.

    Raises:
        ValueError: a name that does not exist, or a dtype that is not measured on this device.
    """
    known = {"dtype": [dtype_name(dtype) for dtype in suite.DTYPES[DEVICE]], "matching": list(MATCHINGS)}
    for what, names in (("dtype", dtypes), ("matching", matchings)):
        for name in names:
            if name not in known[what]:
                raise ValueError(f"--{what} {name}: on this device ({DEVICE}) there are {', '.join(known[what])}")
    found = suite.cases(DEVICE, everything, list(dict.fromkeys(shape_named(name) for name in shapes)))
    return [
        case
        for case in found
        if dtype_name(case.dtype) in (dtypes or known["dtype"]) and case.matching in (matchings or known["matching"])
    ]
