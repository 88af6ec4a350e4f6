"""The ``negengine`` command: ``demo``, ``generate``, ``negative``, ``methods``, ``evaluate``, ``doctor``, ``verify``, ``bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from negengine.cli import bench
from negengine.cli.demo import demo
from negengine.cli.doctor import doctor
from negengine.cli.errors import OneLineGroup
from negengine.cli.evaluate import evaluate
from negengine.cli.generate import generate
from negengine.cli.methods import methods
from negengine.cli.negative import negative
from negengine.cli.verify import verify

app = typer.Typer(cls=OneLineGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(demo)
app.command()(generate)
app.command()(negative)
app.command()(methods)
app.command()(evaluate)
app.command()(doctor)
app.command()(verify)
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        from negengine import __version__

        typer.echo(f"negengine {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Negative guidance: images pushed apart (NegToMe), kept from a prompt (DNG), or from a model's idea of the opposite (DNP)."""
