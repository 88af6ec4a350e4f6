"""Errors of the user's making, as one line without a traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import typer

Command = TypeVar("Command", bound=Callable[..., Any])


def one_line_errors(command: Command) -> Command:
    """Print ValueError, TypeError, OSError, ImportError and RuntimeError as one line and exit with 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except typer.Exit:  # a RuntimeError, but the command's own word
            raise
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            typer.secho(f"error: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error

    return run  # type: ignore[return-value]
