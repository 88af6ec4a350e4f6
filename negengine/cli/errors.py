"""Errors of the user's making, as one line without a traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperGroup

UsageError: Any = typer.BadParameter.__base__  # of typer's click, which is a package of its own or a part of typer
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
            _print(_text(error))
            raise typer.Exit(2) from error

    return run  # type: ignore[return-value]


class OneLineGroup(TyperGroup):
    """Commands whose flags, where they cannot be read, end in the same one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            if not error.message:  # no command was given: that is answered with the help
                raise
            _print(error.format_message())
            raise typer.Exit(2) from error


def _print(text: str) -> None:
    typer.secho(f"error: {' '.join(text.split())}", fg=typer.colors.RED, err=True)


def _text(error: Exception) -> str:
    """Without the number that the system gives an error of a file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
