"""The command line. Commands import what they need when they run, so that --help and status answer at once."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from pipeline import __version__
from schemas.errors import UserError
from schemas.paths import expanded

if TYPE_CHECKING:
    from schemas.config import RunConfig

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # of every wrong command line; it has no public name


class _Commands(TyperGroup):
    """Wrong command lines are told without steering the terminal by what they quote."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _quoting():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _quoting():
            return super().invoke(ctx)


@contextmanager
def _quoting() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        from pipeline.console import printable

        error.message = printable(error.message)  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"congrad-pipeline {__version__}")
        raise typer.Exit


Config = Annotated[
    Path,
    typer.Argument(
        help="YAML config (`init` writes a starter one), or a shipped one: package:configs/demo.yaml", metavar="CONFIG"
    ),
]
Run = Annotated[Path, typer.Argument(help="run directory, or the name of a run under runs/", metavar="RUN")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="override a config value: a.b=value (repeatable)", metavar="KEY=VALUE")
]
RunDirOption = Annotated[Path | None, typer.Option("--run-dir", help="folder that holds runs (config: run_dir)")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]
Round = Annotated[int | None, typer.Option("--round", help="this round only", min=0)]
Exported = Literal["dataset", "model", "adapter"]
Shown = Annotated[int, typer.Option("--round", help="the round to show", min=0)]


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and stop", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Curate multilingual preference data by gradient conflict (ConGrad) and train on it with DPO."""


@app.command()
def run(
    config: Config,
    stage: Annotated[str | None, typer.Option(help="run this stage only")] = None,
    first: Annotated[str | None, typer.Option("--from", help="start at this stage")] = None,
    last: Annotated[str | None, typer.Option("--until", help="stop after this stage")] = None,
    round_: Round = None,
    sets: Sets = None,
    run_dir: RunDirOption = None,
    force: Annotated[
        list[str] | None,
        typer.Option("--force-stage", help="redo this stage, and allow redoing what follows (repeatable)"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would run, and stop")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="say nothing but errors")] = False,
    debug: Debug = False,
) -> None:
    """Bring a run up to date. The same command continues a run that was stopped."""
    with _errors(debug):
        from pipeline.config_file import load_config
        from pipeline.console import Display
        from pipeline.run import preview
        from pipeline.run import run as run_pipeline
        from pipeline.selection import Selection

        resolved = load_config(config, sets or [], run_dir)
        command = shlex.join(["congrad", *(word for word in sys.argv[1:] if word != "--dry-run")])
        selection = Selection(stage, first, last, round_, tuple(force or ()), command)
        display = Display(quiet)
        if resolved.banner and not dry_run:
            display.say(resolved.banner, "bold")
        if dry_run:
            from pipeline.status import print_intentions

            states, look = preview(resolved, selection)
            print_intentions(states, selection)
            for note in look():
                display.say(note)
            return
        outcome = run_pipeline(resolved, selection, display)
        if not outcome.ran:
            display.say(
                f"Up to date: {resolved.folder} ({len(outcome.skipped)} stages, {outcome.seconds:.1f} s)", "green"
            )
            return
        if not quiet:
            from pipeline.summary import print_summary

            print_summary(resolved)


@app.command()
def status(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    debug: Debug = False,
) -> None:
    """What is done, rows in, kept and dropped, and what would run next and why."""
    with _errors(debug):
        from pipeline.status import print_status

        print_status(find_run(run), as_json)


@app.command()
def inspect(
    run: Run,
    table: Annotated[str, typer.Argument(help="prompts, candidates, ..., or dropped/TABLE")],
    where: Annotated[str | None, typer.Option(help='SQL condition, for example "score < 2 AND vote = 0"')] = None,
    lang: Annotated[str | None, typer.Option(help="this language only")] = None,
    limit: Annotated[int, typer.Option(help="rows", min=1)] = 10,
    round_: Shown = 0,
    debug: Debug = False,
) -> None:
    """Rows of a table."""
    with _errors(debug):
        from pipeline.inspect import print_rows

        print_rows(find_run(run), table, where, lang, limit, round_)


@app.command()
def explain(
    run: Run,
    pair: Annotated[str, typer.Argument(help="pair id, or a beginning that no other pair has", metavar="PAIR_ID")],
    neighbours: Annotated[int, typer.Option(help="nearest and most opposed pairs to show", min=1, max=1000)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    round_: Shown = 0,
    debug: Debug = False,
) -> None:
    """Why a pair was kept or not: scores, where the conflict sits, nearest and most opposed pairs, texts."""
    with _errors(debug):
        from pipeline.explain import print_explanation

        folder = find_run(run)
        print_explanation(folder, _config_of(folder), pair, neighbours, as_json, round_)


@app.command()
def report(run: Run, debug: Debug = False) -> None:
    """Write report.html from what there is now."""
    with _errors(debug):
        from pipeline.report import report_now

        _echo(report_now(_config_of(find_run(run))))


@app.command()
def export(
    run: Run,
    what: Annotated[Exported, typer.Option(help="the curated pairs, or what was trained on them")] = "dataset",
    out: Annotated[
        Path | None, typer.Option(help="folder to write (default: RUN/export, RUN/export-model, ...)")
    ] = None,
    push: Annotated[str | None, typer.Option(help="also push to this hub id", metavar="OWNER/NAME")] = None,
    private: Annotated[bool, typer.Option(help="push it as private")] = False,
    round_: Annotated[int | None, typer.Option("--round", help="this round (default: the last)", min=0)] = None,
    debug: Debug = False,
) -> None:
    """Write curated pairs as a Hugging Face dataset folder, or the trained model or adapter, with a card."""
    with _errors(debug):
        from pipeline.export import export_dataset
        from pipeline.export_model import export_model

        folder = find_run(run)
        config = _config_of(folder)
        if what == "dataset":
            target = Path(_expanded(out)) if out else folder / "export"
            _echo(export_dataset(config, target, round_, push, private))
        else:
            target = Path(_expanded(out)) if out else folder / f"export-{what}"
            _echo(export_model(config, target, what, round_, push, private))


@app.command()
def doctor(
    config: Config,
    quick: Annotated[bool, typer.Option("--quick", help="load no weights, measure no sample")] = False,
    sets: Sets = None,
    run_dir: RunDirOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    debug: Debug = False,
) -> None:
    """Checks before a long run: a line each, and what to do. Exit code 1 when something would go wrong."""
    with _errors(debug):
        from pipeline.config_file import load_config
        from pipeline.doctor import print_doctor

        if print_doctor(load_config(config, sets or [], run_dir), quick, as_json):
            raise typer.Exit(1)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="file to write")] = Path("congrad.yaml"),
    source: Annotated[
        str, typer.Option("--from", help="shipped config to start from: starter, demo, curate, ...")
    ] = "starter",
    debug: Debug = False,
) -> None:
    """Write a commented starter config, or a copy of another shipped one."""
    with _errors(debug):
        from stages.data import read_data

        text = read_data(f"configs/{source.removesuffix('.yaml')}.yaml")
        target = Path(_expanded(path))
        try:
            with target.open("x", encoding="utf-8") as file:  # never through a link, never over a file
                file.write(text)
        except FileExistsError:
            raise UserError("The file exists already", where=str(path), fix="Name another.") from None
        first = "Set model.policy and prompts.sources, then: " if source == "starter" else "Look through it, then: "
        _echo(f"Wrote {target}. {first}congrad run {shlex.quote(str(target))}")


def _expanded(path: Path) -> str:
    try:
        return expanded(str(path))
    except ValueError as error:
        raise UserError(f"The path cannot be used: {error}", where=str(path)) from None


def _echo(result: object) -> None:
    """A result on standard output, as text that steers no terminal."""
    from pipeline.console import printable

    typer.echo(printable(str(result)))


def find_run(run: Path) -> Path:
    """The run directory of a path or a name under runs/. Raises UserError if there is none."""
    given = Path(_expanded(run))
    for folder in (given, Path("runs") / given):
        try:
            (folder / "run.yaml").stat()
        except PermissionError:
            raise UserError(
                "The run may not be read", where=str(folder), fix="Change its owner or permissions."
            ) from None
        except (OSError, ValueError):
            continue
        return folder
    raise UserError(
        "There is no run here", where=str(run), fix="Give a run directory (it holds run.yaml), or a name under runs/."
    )


def _config_of(folder: Path) -> RunConfig:
    """The run's config, with the folder it lies in now: a moved run still works."""
    from pipeline.config_file import load_config

    config = load_config(folder / "run.yaml")
    return config.model_copy(update={"run_dir": folder.resolve().parent, "name": folder.resolve().name})


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """One paragraph for every error; tracebacks only when asked for."""
    from pipeline.console import printable
    from pipeline.executor_errors import Interrupted, StageFailed

    def fail(message: str, code: int) -> NoReturn:
        typer.secho(printable(message), err=True, fg=typer.colors.RED)
        if debug:
            typer.echo(printable(traceback.format_exc()), err=True)
        raise typer.Exit(code)

    try:
        yield
    except UserError as error:
        fail(str(error), 1)
    except StageFailed as error:
        fail(str(error) + (f"\n{error.trace}" if debug else " Run again with --debug for the traceback."), 2)
    except Interrupted as stop:
        fail(f"Stopped by {stop}. What is committed stays; the same command continues.", 128 + stop.signal)
    except KeyboardInterrupt:
        fail("Stopped.", 130)
    except BrokenPipeError:
        sys.stderr.close()
    except OSError as error:  # a target that cannot be written, a file that may not be read
        from pipeline.storage import storage_error

        known = storage_error(error, Path())
        fail(str(known or UserError(error.strerror or str(error), where=os.fsdecode(error.filename or ""))), 1)
