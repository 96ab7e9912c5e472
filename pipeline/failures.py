"""Ends a run that is failing everywhere: rows that failed (errors, not rules) against execution.max_failed_fraction."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from pipeline.parts import Parts
from pipeline.rundir import RunDir
from schemas.errors import UserError
from stages.spec import StageSpec

_NUMBER = re.compile(r"\d+")
_LEAST = 10
"""Fewer failed rows than this end a run only when they are most of a whole stage."""


class Failures:
    """What of one stage has failed so far."""

    def __init__(self, rundir: RunDir, spec: StageSpec, round_: int, limit: float) -> None:
        self._rundir, self._spec, self._round, self._limit = rundir, spec, round_, limit

    def worth_another_try(self, parts: Parts) -> list[int]:
        """Committed parts that fail too much: an error is no result, so a run that starts again makes them anew."""
        return [index for index, failed in parts.failed_of.items() if self._worst(failed, least=1)]

    def check(self, parts: Parts, finished: bool) -> None:
        """Raise UserError when a larger share failed than the config allows: what share, and the commonest error."""
        worst = self._worst(parts.failed(), _LEAST, finished)
        if worst is None:
            return
        unit, failed, rows_in = worst
        example, count = self._commonest(unit, parts)
        raise UserError(
            f"Stage {self._spec.name}: {failed:,} of {rows_in:,} {unit}s failed ({failed / rows_in:.0%}), more than "
            f"the {self._limit:.0%} that execution.max_failed_fraction allows; most often ({count:,} times) {example}",
            where=str(self._rundir.table(self._spec, self._round, "dropped")),
            fix="Correct that and give the same command: parts that failed are made anew, the others kept. To go on "
            "without these rows, raise execution.max_failed_fraction.",
        )

    def _worst(
        self, units: Iterable[tuple[str, int, int]], least: int, finished: bool = False
    ) -> tuple[str, int, int] | None:
        """(unit, failed, rows in) of a unit over the limit."""
        for unit, failed, rows_in in units:
            enough = failed >= least or (finished and 2 * failed > rows_in)
            if enough and failed > self._limit * rows_in:
                return unit, failed, rows_in
        return None

    def _commonest(self, unit: str, parts: Parts) -> tuple[str, int]:
        """(reason and one detail, how often) of the most frequent failure."""
        import polars as pl

        paths = [
            self._rundir.root / f.path for index in parts.failed_of for f in parts.files[index] if f.table == "dropped"
        ]
        rows = pl.scan_parquet(paths, glob=False).filter(pl.col("failed") & (pl.col("unit") == unit))
        counts: Counter[tuple[str, str]] = Counter()
        details: dict[tuple[str, str], str] = {}
        for reason, detail in rows.select("reason", "detail").collect().iter_rows():
            key = reason, _NUMBER.sub("0", detail)
            counts[key] += 1
            details.setdefault(key, detail)
        key, count = counts.most_common(1)[0]
        return f"{key[0]}: {details[key]}".rstrip(": "), count
