"""Results are written as soon as there are any, and whatever ends a run leaves what was measured until then."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from negengine.bench.documents import shown
from negengine.bench.results import Results, omissions
from negengine.cli.bench.report import write

if TYPE_CHECKING:
    from negengine.bench.whole import Measured

TURNS = ("case", "compiled", "attention")
INTERRUPTED = 130  # as a shell says of Ctrl-C


def record(groups: Generator[Measured, None, None], results: Results, output: Path) -> None:
    """Write each group when it has been measured, and at the end, however it comes, the page.

    Raises:
        typer.Exit: the user, or the system, stopped it.
        ValueError: no variant could be measured; nothing is written then.
    """
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    interrupted = False
    with terminating_interrupts():
        try:
            with contextlib.closing(groups):
                for group in groups:
                    rows += group.rows
                    left_out |= group.left_out
                    if rows:
                        results.add(group.rows, None, left_out, TURNS)
                    interrupted = group.interrupted
                    if interrupted:
                        break
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if interrupted:
                typer.echo(
                    f"stopped: {'what was measured until then is kept' if rows else 'no round was whole, nothing is written'}"
                )
            if rows:
                tell(rows, left_out, results, output)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if not rows:
        typer.echo(f"left out:\n{omissions(left_out)}")
        raise ValueError("nothing could be measured, for the reasons above; nothing is written")


def tell(rows: list[dict[str, Any]], left_out: dict[str, str], results: Results, output: Path) -> None:
    """The new rows and what was left out as text, and the page of all that the file holds."""
    from negengine.bench import whole

    typer.echo(whole.table(rows))
    if left_out:
        typer.echo(f"left out:\n{omissions(left_out)}")
    typer.echo(results.path)
    write([shown(results.path.name, results.document)], output)


@contextlib.contextmanager
def terminating_interrupts() -> Iterator[None]:
    """A ``with`` in which SIGTERM does what Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may do this
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """A ``with`` in which there is a folder; if nothing was put into it, what was made of it is taken away again."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in made:
            if any(folder.iterdir()):
                break
            folder.rmdir()
