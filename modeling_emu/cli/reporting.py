"""What all commands share towards their user: results on stdout, progress and errors on stderr, the range of seeds."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer


EXIT_USER_ERROR = 2
MAX_SEED = 2**63 - 1  # of torch's generators


def is_user_error(error: Exception) -> bool:
    """Whether `error` is about what the user gave: values, files, packages, a run that diverges, too little memory."""
    if isinstance(error, ValueError | OSError | ImportError | FloatingPointError):
        return True
    return type(error).__name__ in ("SafetensorError", "OutOfMemoryError")  # their libraries are not imported here


def describe_error(error: Exception) -> str:
    """The line that says what the user can mend."""
    return f"emu: {' '.join(str(error).split()) or type(error).__name__}"


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command that ends in one line and exit code 2 where the user can mend the cause."""

    @functools.wraps(command)
    def reporting_command(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            if os.environ.get("EMU_TRACEBACK") or not is_user_error(error):
                raise
            typer.echo(describe_error(error), err=True)
            raise typer.Exit(EXIT_USER_ERROR) from error

    return reporting_command


@contextmanager
def progress(message: str) -> Iterator[None]:
    """Say on stderr what is being done: a spinner on a terminal, a line anywhere else."""
    from rich.console import Console

    console = Console(stderr=True)
    if sys.stderr.isatty():
        with console.status(message):
            yield
    else:
        console.print(message, highlight=False, markup=False)
        yield
