"""A run in Python: bring it up to date, open it, look at its tables, compare, explain, take the curated pairs (docs/python.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.console import Display, quietly
from pipeline.damage import reading, refuse_damaged
from pipeline.existing import config_given, config_of, find_run
from pipeline.inspect import scan_table, table_files, tables_of
from pipeline.selection import Selection
from pipeline.status import states_of
from schemas.config import RunConfig
from stages.contract import Progress, Silent

if TYPE_CHECKING:
    import polars as pl

    from stages.compare.figures import Comparison
    from stages.compare.known_errors import KnownErrors
    from stages.select.dataset import Dataset


def run(
    config: RunConfig | str | Path,
    *,
    settings: Sequence[str] = (),
    until: str | None = None,
    force: Sequence[str] = (),
    quiet: bool = False,
) -> Run:
    """Bring a run up to date, as the command does; it goes on where one was stopped.

    config: a config, or the path of one (`package:configs/…` too). settings: `a.b=value` each, for a path. until: the last stage to run;
    force: stages whose finished work may be redone. Raises UserError (something to fix), StageFailed and other Defects, Interrupted.
    """
    from pipeline.loop import run as bring_up_to_date

    _refuse_text(settings=settings, force=force)
    if isinstance(config, RunConfig):
        if settings:
            raise ValueError(
                "settings go with the path of a config: a RunConfig has its own (load_config(path, settings))"
            )
        resolved = config
    else:
        resolved = config_given(Path(config), settings)
    with quietly(quiet):
        selection = Selection(last=until, force=tuple(force), redo="run(…, force=['{stage}'])")
        bring_up_to_date(resolved, selection, Display(quiet))
    return Run(resolved.folder)


class Run:
    """A run directory, opened for reading. Tables are those that are finished and current, as `congrad status` says."""

    def __init__(self, run: str | Path) -> None:
        """run: its directory, or the name of one under runs/. Raises UserError if there is none."""
        self.folder = find_run(Path(run)).absolute()

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def config(self) -> RunConfig:
        """The config of the last command, with the folder the run lies in now."""
        return config_of(self.folder)

    @property
    def states(self) -> dict[str, str]:
        """Stage -> done, new, changed, ... ; `judge, round 1` from the second round on."""
        return {state.step.title: state.kind for state in states_of(self.folder)}

    def tables(self, round: int = 0) -> list[str]:
        """Names of the tables that there are: docs/tables.md. `dropped/TABLE` are rows that were dropped, with reasons."""
        return sorted(tables_of(self.folder, round))

    def table(self, name: str, round: int = 0) -> pl.LazyFrame:
        """A table's rows, read when they are collected. Raises UserError if there is no such table, naming those there are."""
        return scan_table(self.folder, name, round)

    def scores(self, round: int = 0) -> pl.LazyFrame:
        """The table `scores`, with whether each pair was kept and, if not, why (`kept`, `reason`; null before the stage select)."""
        import polars as pl

        if "curated" not in self.tables(round):
            undecided = pl.lit(None, pl.Boolean).alias("kept"), pl.lit(None, pl.String).alias("reason")
            return self.table("scores", round).with_columns(*undecided)
        kept = self.table("curated", round).select("pair_id", kept=pl.lit(True), reason=pl.lit(None, pl.String))
        gone = self.table("rejected", round).select("pair_id", "reason", kept=pl.lit(False))
        decided = pl.concat([kept, gone.select("pair_id", "kept", "reason")])
        return self.table("scores", round).join(decided, on="pair_id", how="left", maintain_order="left")

    def curated(self, round: int = 0) -> Dataset:
        """The curated pairs in memory, as TRL's DPOTrainer takes them: prompt, chosen, rejected as messages, and what is known of each.

        Raises UserError for a file that is no longer what was written: what is trained on is read with its hash, as an export reads it.
        """
        from stages.select.dataset import as_dataset

        parts = table_files(self.folder, "curated", round)
        for state in states_of(self.folder):
            if state.step.round == round and "curated" in state.step.spec.writes and state.manifest is not None:
                refuse_damaged(self.folder, "curated", state.manifest.table_files("curated"))
        return as_dataset(parts)

    def compare(self, *arms: str, round: int = 0, examples: int = 3, progress: Progress | None = None) -> Comparison:
        """Other selections beside the run's own, as `congrad compare`; without arms, the default ones."""
        from pipeline.compare import comparison

        _refuse_negative(examples=examples)
        for arm in arms:
            if not isinstance(arm, str):
                raise TypeError(
                    f"an arm is a text, as compare('random', 'select.keep=0.3'), and no {type(arm).__name__}"
                )
        return comparison(self.folder, arms, round, progress or Silent(), examples)

    def explain(self, pair_id: str, neighbours: int = 5, round: int = 0) -> dict[str, Any]:
        """All that is known of a pair, as `congrad explain --json`; a beginning of its id will do. Raises UserError where none or several fit."""
        from pipeline.explain import explanation, find_pair

        _refuse_negative(neighbours=neighbours)
        with reading(self.folder):
            files = tables_of(self.folder, round)
            return explanation(self.config, files, find_pair(files, pair_id, str(self.folder)), neighbours, round)

    def known_errors(self, round: int = 0) -> list[KnownErrors]:
        """What became of pairs that the data says are wrong (`fields.label_error`), by kind; empty where it says nothing, and until pairs are selected."""
        from stages.compare.known_errors import known_errors

        files = tables_of(self.folder, round)
        if "curated" not in files:
            return []
        stats = [
            s.manifest.stats
            for s in states_of(self.folder)
            if s.kind == "done" and s.manifest and s.step.round == round
        ]
        merged = {name: value for one in stats for name, value in one.items()}
        return known_errors(files.get("pairs", []), files.get("curated", []), files.get("rejected", []), merged)

    def fork(self, new: str | Path, *settings: str) -> Run:
        """A new run with `a.b=value` settings that shares what this one has finished, as `congrad fork`."""
        from pipeline.fork import fork

        return Run(fork(self.folder, Path(new), settings).config.folder)

    def report(self, *arms: str) -> Path:
        """Write report.html, with `arms` beside the run's own selection; its path."""
        from pipeline.report import report_now
        from pipeline.storage import storage_error

        try:
            return report_now(self.config, arms)
        except OSError as error:
            raise (storage_error(error, None, "report") or error) from error


def _refuse_negative(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name} is a number of 0 or more, and {number} was given")


def _refuse_text(**lists: Sequence[str]) -> None:
    for name, values in lists.items():
        if isinstance(values, str):
            raise TypeError(f"{name} is a list of texts: {name}=[{values!r}]")
