"""The report: written after every run and on demand, from what is finished then. It belongs to no round and is no stage."""

from __future__ import annotations

import traceback
from pathlib import Path

from pipeline.executor_errors import StageFailed
from pipeline.plan import Planner
from pipeline.rundir import RunDir
from schemas.config import RunConfig
from schemas.errors import UserError


def refresh_report(config: RunConfig, rundir: RunDir, planner: Planner) -> bool:
    """Write the page unless the one that is there shows what there is now; whether it was written.

    Raises StageFailed for a defect; what the run made stays.
    """
    from stages.report.data import Tables
    from stages.report.page import is_current, write_page

    manifests = planner.manifests()
    if is_current(rundir.report, config, manifests):
        return False
    try:
        write_page(rundir.report, config, Tables(_tables(planner)), manifests)
    except (UserError, OSError):
        raise
    except Exception as error:
        trace = traceback.format_exc()
        raise StageFailed("report", f"{type(error).__name__}: {error}", trace, rundir.logs) from error
    return True


def report_now(config: RunConfig) -> Path:
    """The path of the page, which shows what there is now; also while the run goes on, so no lease is taken."""
    rundir = RunDir(config.folder)
    refresh_report(config, rundir, Planner(config, rundir, lambda step: {}, lambda spec: {}, frozen=True))
    return rundir.report


def _tables(planner: Planner) -> dict[str, list[Path]]:
    """Files of every finished table in order, by `table:round`, or `table` where all rounds share it."""
    tables: dict[str, list[Path]] = {}
    for step in planner.steps:
        manifest = planner.manifest(step)
        for table in step.spec.writes if manifest else ():
            name = f"{table}:{step.round}" if step.spec.per_round else table
            tables[name] = [planner.rundir.root / file.path for file in manifest.table_files(table)] if manifest else []
    return tables
