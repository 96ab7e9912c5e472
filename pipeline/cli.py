"""The command line. Commands import what they need when they run, so that --help and status answer at once."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from pipeline import __version__, cli_runs
from pipeline.command import (
    Commands,
    Config,
    Debug,
    Exported,
    Quiet,
    Round,
    Run,
    RunDirOption,
    Sets,
    Shown,
    echo,
    errors,
)
from schemas.errors import UserError

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"congrad-pipeline {__version__}")
        raise typer.Exit


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
    from pipeline.console import quietly

    with errors(debug), quietly(quiet):
        from pipeline.console import Display
        from pipeline.existing import config_given
        from pipeline.loop import preview
        from pipeline.loop import run as run_pipeline
        from pipeline.selection import Selection

        resolved = config_given(config, sets or [], run_dir)
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
        if outcome.hosted:
            return
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
    with errors(debug):
        from pipeline.existing import find_run
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
    with errors(debug):
        from pipeline.existing import find_run
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
    with errors(debug):
        from pipeline.existing import config_of, find_run
        from pipeline.explain import print_explanation

        folder = find_run(run)
        print_explanation(folder, config_of(folder), pair, neighbours, as_json, round_)


@app.command()
def report(run: Run, arm: cli_runs.Arms = None, debug: Debug = False) -> None:
    """Write report.html from what there is now, with selections beside the run's own (see `compare`)."""
    with errors(debug):
        from pipeline.existing import config_of, find_run
        from pipeline.report import report_now

        echo(report_now(config_of(find_run(run)), arm or []))


@app.command()
def export(
    run: Run,
    what: Annotated[Exported, typer.Option(help="the curated pairs, or what was trained on them")] = "dataset",
    out: Annotated[
        str | None,
        typer.Option(
            help="folder to write (default: RUN/export, RUN/export-model, ...), or s3://..., gs://...",
            metavar="PATH|URL",
        ),
    ] = None,
    push: Annotated[str | None, typer.Option(help="also push to this hub id", metavar="OWNER/NAME")] = None,
    private: Annotated[bool, typer.Option(help="push it as private")] = False,
    round_: Annotated[int | None, typer.Option("--round", help="this round (default: the last)", min=0)] = None,
    sets: Sets = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write curated pairs as a Hugging Face dataset folder, or the trained model or adapter, with a card."""
    from pipeline.console import quietly

    with errors(debug), quietly(quiet):
        from pipeline.console import Display
        from pipeline.existing import config_of, find_run, usable_path
        from pipeline.export import export_dataset
        from pipeline.export_model import export_model
        from pipeline.export_remote import is_remote, send

        folder = find_run(run)
        config = config_of(folder, sets or ())
        if out == "":
            raise UserError("--out is empty", where="--out", fix="Give a folder, or leave --out away.")
        url = out if out and is_remote(out) else None
        own = folder / ("export" if what == "dataset" else f"export-{what}")
        target = usable_path(Path(out)) if out and not url else own
        if what == "dataset":
            export_dataset(config, target, round_, push, private)
        else:
            export_model(config, target, what, round_, push, private)
        echo(send(target, url) if url else target)
        key = "dataset_license" if what == "dataset" else "model_license"
        if getattr(config.card, key) is None:
            Display(quiet).say(f"The card names no licence: --set card.{key}=... adds it.", "yellow")


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
    with errors(debug):
        from pipeline.doctor import print_doctor
        from pipeline.existing import config_given

        if print_doctor(config_given(config, sets or [], run_dir), quick, as_json):
            raise typer.Exit(1)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="file to write", readable=False)] = Path("congrad.yaml"),
    source: Annotated[
        str, typer.Option("--from", help="shipped config to start from: starter, demo, curate, ...")
    ] = "starter",
    debug: Debug = False,
) -> None:
    """Write a commented starter config, or a copy of another shipped one."""
    with errors(debug):
        from pipeline.existing import usable_path
        from stages.data import read_data

        text = read_data(f"configs/{source.removesuffix('.yaml')}.yaml")
        target = usable_path(path)
        try:
            with target.open("x", encoding="utf-8") as file:  # never through a link, never over a file
                file.write(text)
        except FileExistsError:
            raise UserError("The file exists already", where=str(path), fix="Name another.") from None
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                with suppress(OSError):  # half of it is written
                    target.unlink()
                raise
            raise UserError("There is no folder for the file", where=str(path), fix="Make it first.") from None
        first = "Set model.policy and prompts.sources, then: " if source == "starter" else "Look through it, then: "
        echo(
            f"Wrote {target}. {first}congrad run {shlex.quote(f'./{target}' if str(target).startswith('-') else str(target))}"
        )


for _command in (cli_runs.compare, cli_runs.table, cli_runs.fork):
    app.command()(_command)
