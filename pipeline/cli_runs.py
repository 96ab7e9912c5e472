"""Commands that put a run beside others: registered by `pipeline.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.command import Debug, Quiet, Run, Sets, Shown, echo, errors

Arms = Annotated[
    list[str] | None,
    typer.Option(
        "--arm",
        help="a selection to compare with the run's own: a filter (margin), all, or settings (select.keep=0.3 "
        "conflict.surgery=mean); 'NAME: ...' names it; repeatable",
        metavar="ARM",
    ),
]
_SEEDS, _EXAMPLES = 3, 3
"""Where nothing is said."""


def compare(
    run: Run,
    arm: Arms = None,
    train: Annotated[
        str | None,
        typer.Option(
            help="train and evaluate these selections at equal steps: filters and `all`, with commas between; with --arm also those",
            metavar="ARM,ARM",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help=f"--train: trainings of each (default: {_SEEDS})", min=1, max=1000)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="--train: folder of the runs (default: NAME-trained beside the run)")
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(help=f"pairs to show that only one keeps, per arm (default: {_EXAMPLES})", min=0, max=1000),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    round_: Shown = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Other filters, shares and conflict settings beside the run's own, on one pool of pairs, from what is stored."""
    from pipeline.console import quietly

    with errors(debug), quietly(quiet):
        from pipeline.compare import comparison
        from pipeline.compare_view import print_comparison
        from pipeline.console import Display
        from pipeline.existing import find_run, usable_path
        from schemas.errors import UserError
        from stages.contract import Silent

        unused = [name for name, given in (("--examples", examples is not None), ("--round", round_ != 0)) if given]
        if train is not None and unused:
            raise UserError(f"{unused[0]} has no use with --train", fix="Leave it out.")
        if train is not None:
            from pipeline.trials import trained
            from pipeline.trials_view import print_trials, write_tables

            texts = [text.strip() for text in train.split(",") if text.strip()]
            result = trained(
                find_run(run),
                [*texts, *(arm or [])],
                seeds or _SEEDS,
                usable_path(out) if out else None,
                Display(quiet),
            )
            print_trials(result, write_tables(result), as_json)
            return
        if out is not None:
            raise UserError("--out is the folder of trained selections", fix="Give --train too, or leave it out.")
        if seeds is not None:
            raise UserError("--seeds is how often a selection is trained", fix="Give --train too, or leave it out.")
        found = comparison(
            find_run(run), arm or [], round_, Silent(Display(quiet).say), _EXAMPLES if examples is None else examples
        )
        print_comparison(found, as_json)


def table(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="runs that are evaluated, or folders of compare --train; NAME=RUN gives a method, or the methods of a folder, a name",
            metavar="RUN...",
        ),
    ],
    form: Annotated[
        str, typer.Option(help="md, tex (booktabs), or csv, which holds every figure", metavar="md|tex|csv")
    ] = "md",
    by_language: Annotated[
        str | None, typer.Option(help="a column a language, of this metric (accuracy, win_rate, ...)", metavar="METRIC")
    ] = None,
    debug: Debug = False,
) -> None:
    """Methods in one table, as papers print it: seen and unseen languages, and what alignment cost on benchmarks."""
    with errors(debug):
        from pipeline.paper import form_of, gathered, written

        chosen = form_of(form)
        echo(written(gathered(runs), chosen, by_language).rstrip("\n"))


def fork(
    run: Run,
    new: Annotated[Path, typer.Argument(help="the new run: a path, or a name beside the old one", metavar="NEW")],
    sets: Sets = None,
    debug: Debug = False,
) -> None:
    """A new run with other settings that shares what RUN has finished, up to the first stage that they change."""
    with errors(debug):
        from pipeline.existing import find_run, usable_path
        from pipeline.fork import fork as make
        from pipeline.fork_view import told

        echo(told(make(find_run(run), usable_path(new), sets or [])))
