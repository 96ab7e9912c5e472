"""Commands that put a run beside others: registered by `pipeline.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.command import Debug, Run, Sets, Shown, echo, errors

Arms = Annotated[
    list[str] | None,
    typer.Option(
        "--arm",
        help="a selection to compare with the run's own: a filter (margin), all, or settings (select.keep=0.3 "
        "conflict.surgery=mean); 'NAME: ...' names it; repeatable",
        metavar="ARM",
    ),
]


def compare(
    run: Run,
    arm: Arms = None,
    examples: Annotated[int, typer.Option(help="pairs to show that only one keeps, per arm", min=0, max=1000)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    round_: Shown = 0,
    debug: Debug = False,
) -> None:
    """Other filters, shares and conflict settings beside the run's own, on one pool of pairs, from what is stored."""
    with errors(debug):
        from pipeline.compare import comparison
        from pipeline.compare_view import print_comparison
        from pipeline.console import Display
        from pipeline.existing import find_run
        from stages.contract import Silent

        found = comparison(find_run(run), arm or [], round_, Silent(Display().say), examples)
        print_comparison(found, as_json)


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
