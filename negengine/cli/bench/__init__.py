"""``negengine bench``: what the methods cost on this machine, as files, pages and comparisons."""

from __future__ import annotations

import typer

from negengine.cli.bench.compare import compare
from negengine.cli.bench.model import model
from negengine.cli.bench.operator import operator
from negengine.cli.bench.report import report

app = typer.Typer(no_args_is_help=True, help="Measure what the methods cost: of the operator, of whole models; compare and show.")
app.command()(operator)
app.command()(model)
app.command()(compare)
app.command()(report)
