"""What the commands of the command line share: their arguments, how they fail and how they answer."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from schemas.errors import UserError

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # of every wrong command line; it has no public name
_running: ContextVar[str] = ContextVar("_running", default="")
"""The command, by its name: typer has no public way to the context of the one that runs."""


class Commands(TyperGroup):
    """Wrong command lines are told without steering the terminal by what they quote."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _quoting():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _quoting():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        _running.set(name or "")
        return name, command, rest


@contextmanager
def _quoting() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        from pipeline.console import printable

        error.message = printable(error.message)  # type: ignore[attr-defined]
        raise


Config = Annotated[
    Path,
    typer.Argument(
        help="YAML config (`init` writes a starter one), or a shipped one: package:configs/demo.yaml",
        metavar="CONFIG",
        readable=False,
    ),
]
Run = Annotated[
    Path, typer.Argument(help="run directory, or the name of a run under runs/", metavar="RUN", readable=False)
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="override a config value: a.b=value (repeatable)", metavar="KEY=VALUE")
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="folder that holds runs (config: run_dir)", readable=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="the result and errors, no progress and no notes")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]
Round = Annotated[int | None, typer.Option("--round", help="this round only", min=0)]
Exported = Literal["dataset", "model", "adapter"]
Shown = Annotated[int, typer.Option("--round", help="the round to show", min=0)]


def echo(result: object) -> None:
    """A result on standard output, as text that steers no terminal."""
    from pipeline.console import printable

    typer.echo(printable(str(result)))


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """One paragraph for every error; tracebacks only when asked for."""
    from pipeline.console import printable
    from pipeline.executor_errors import Defect, Interrupted

    def fail(message: str, code: int) -> NoReturn:
        with suppress(OSError):  # of a terminal that is gone: the exit code is still to be heard
            typer.secho(printable(message), err=True, fg=None if os.environ.get("NO_COLOR") else typer.colors.RED)
            if debug:
                typer.echo(printable(traceback.format_exc()), err=True)
        raise typer.Exit(code)

    try:
        yield
    except UserError as error:
        fail(str(error), 1)
    except Defect as error:
        fail(str(error) + (f"\n{error.trace}" if debug else " Run again with --debug for the traceback."), 2)
    except Interrupted as stop:
        fail(f"Stopped by {stop}. What is committed stays; the same command continues.", 128 + stop.signal)
    except KeyboardInterrupt:
        fail("Stopped.", 130)
    except BrokenPipeError:  # whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a target that cannot be written, a file that may not be read
        from pipeline.storage import shown_path, storage_error

        known = storage_error(error, None, _running.get())
        fail(str(known or UserError(error.strerror or str(error), where=shown_path(error.filename))), 1)
