"""The report: written after every run and on demand, from what is finished then. It belongs to no round and is no stage."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.arms import arms_of
from pipeline.compare import comparison
from pipeline.damage import reading
from pipeline.executor_errors import StageFailed
from pipeline.plan import Planner, State, not_current
from pipeline.rundir import RunDir
from pipeline.status import recorded_planner
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import Silent

if TYPE_CHECKING:
    from stages.compare.figures import Comparison


LARGEST = 200_000
"""Training pairs up to which every report compares selections: it takes seconds."""


def refresh_report(config: RunConfig, rundir: RunDir, planner: Planner, arms: Sequence[str] = ()) -> bool:
    """Write the page unless the one that is there shows what there is now; whether it was written.

    arms: selections to show beside the run's own, as `pipeline.arms` reads them; none: the default ones. Raises UserError for one that
    cannot be compared, StageFailed for a defect; what the run made stays.
    """
    from stages.report.data import Tables
    from stages.report.page import is_current, write_page

    states = planner.states()
    made = [state.manifest for state in states if state.kind == "done" and state.manifest]
    left_out = _left_out(states)
    if is_current(rundir.report, config, made, left_out, arms):
        return False
    try:
        with reading(rundir.root):
            found = _compared(rundir, states, arms)
            write_page(rundir.report, config, Tables(_tables(rundir, states)), made, left_out, found, arms)
    except (UserError, OSError):
        raise
    except Exception as error:
        trace = traceback.format_exc()
        raise StageFailed("report", f"{type(error).__name__}: {error}", trace, rundir.logs) from error
    return True


def report_now(config: RunConfig, arms: Sequence[str] = ()) -> Path:
    """The path of the page, which shows what there is now; also while the run goes on, so no lease is taken."""
    rundir, planner = RunDir(config.folder), recorded_planner(config, config.folder)
    if arms_of(arms)[1:] and not any("curated" in state.step.spec.writes for state in planner.current()):
        raise UserError(
            "There is no finished selection with the run's settings to put other arms beside",
            where=str(config.folder),
            fix="Bring the run up to date first: congrad run CONFIG.",
        )
    refresh_report(config, rundir, planner, arms)
    return rundir.report


def _compared(rundir: RunDir, states: list[State], arms: Sequence[str]) -> dict[int, Comparison | str]:
    """Round -> the selection beside others, or why the default ones could not be put beside it."""
    found: dict[int, Comparison | str] = {}
    for state in states:
        if state.kind != "done" or state.manifest is None or "curated" not in state.step.spec.writes:
            continue
        pairs = sum(file.rows or 0 for name in state.step.spec.writes for file in state.manifest.table_files(name))
        if pairs > LARGEST and not arms:
            found[state.step.round] = f"with more than {LARGEST:,} pairs it is made on demand: congrad compare RUN."
            continue
        try:
            found[state.step.round] = comparison(rundir.root, arms, state.step.round, Silent())
        except UserError as error:
            if arms:
                raise
            found[state.step.round] = str(error)
    return found


def _left_out(states: list[State]) -> dict[str, str]:
    """title -> why, of results that are there and that the page must not show beside the others: they are not current."""
    return {s.step.title: not_current(s) for s in states if s.kind in ("changed", "stale") and s.seconds}


def _tables(rundir: RunDir, states: list[State]) -> dict[str, list[Path]]:
    """Files of every finished and current table in order, by `table:round`, or `table` where all rounds share it."""
    tables: dict[str, list[Path]] = {}
    for state in states:
        if state.kind != "done" or state.manifest is None:
            continue
        for table in state.step.spec.writes:
            name = f"{table}:{state.step.round}" if state.step.spec.per_round else table
            tables[name] = [rundir.root / file.path for file in state.manifest.table_files(table)]
    return tables
