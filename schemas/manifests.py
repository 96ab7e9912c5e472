"""What is written beside the tables: plans, part manifests, stage manifests. All JSON, all human-readable."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, model_validator
from pydantic.dataclasses import dataclass

MANIFEST_VERSION = 1
SCHEMA_VERSION = 3  # of the tables: bumped when columns of many stages change (of one: its version), so that old rows are never mixed with new ones


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, config=_STRICT)
class FileRecord:
    """A published file: path relative to the run directory, bytes, SHA-256, rows (None if no table). No model: there are
    hundreds of thousands of them, and of shards."""

    path: str
    bytes: int
    sha256: str
    table: str | None = None
    rows: int | None = None


class Tally(_Frozen):
    """Accounting of one unit (prompt, candidate, pair, row) in one language; in = kept + dropped + failed."""

    unit: str
    language: str
    rows_in: NonNegativeInt
    kept: NonNegativeInt
    dropped: dict[str, NonNegativeInt] = {}
    failed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _balanced(self) -> Tally:
        out = self.kept + sum(self.dropped.values()) + self.failed
        if self.rows_in != out:
            raise ValueError(
                f"{self.unit}s in {self.language}: {self.rows_in} in but {out} accounted for "
                f"(kept {self.kept}, dropped {self.dropped}, failed {self.failed})"
            )
        return self


def merge_tallies(tallies: Iterable[Tally]) -> list[Tally]:
    """Sum by (unit, language), in sorted order."""
    groups: dict[tuple[str, str], list[Tally]] = defaultdict(list)
    for tally in tallies:
        groups[tally.unit, tally.language].append(tally)
    merged = []
    for (unit, language), group in sorted(groups.items()):
        dropped: dict[str, int] = defaultdict(int)
        for tally in group:
            for reason, count in tally.dropped.items():
                dropped[reason] += count
        merged.append(
            Tally(
                unit=unit,
                language=language,
                rows_in=sum(t.rows_in for t in group),
                kept=sum(t.kept for t in group),
                dropped=dict(sorted(dropped.items())),
                failed=sum(t.failed for t in group),
            )
        )
    return merged


@dataclass(frozen=True, slots=True, config=_STRICT)
class ShardRange:
    """Rows [start, stop) of the stage's input table."""

    index: int
    start: int
    stop: int


class StagePlan(_Frozen):
    """Fixed before work starts: what the stage depends on and how its input is cut, never by worker count. models: role -> how the config named
    the model whose content is among the ingredients; empty in plans of before."""

    version: int = MANIFEST_VERSION
    stage: str
    round: int
    fingerprint: str
    ingredients: dict[str, Any]
    shards: list[ShardRange]
    models: dict[str, str] = {}


class PartManifest(_Frozen):
    """The commit of one part: a part without this file does not exist."""

    version: int = MANIFEST_VERSION
    stage: str
    round: int
    index: int
    fingerprint: str
    files: list[FileRecord]
    tallies: list[Tally]
    stats: dict[str, float] = {}
    seconds: float = 0.0


class PartFiles(BaseModel):
    """Of a `PartManifest` what says that the part is there. Its tallies are most of it, and no business of planning."""

    model_config = ConfigDict(frozen=True)

    version: int = MANIFEST_VERSION
    index: int
    fingerprint: str
    files: list[FileRecord]
    seconds: float = 0.0


class StageManifest(_Frozen):
    """Written once by the driver when every part is in."""

    version: int = MANIFEST_VERSION
    stage: str
    round: int
    fingerprint: str
    content: str
    files: list[FileRecord]
    tallies: list[Tally]
    stats: dict[str, float] = {}
    seconds: float = 0.0
    models: dict[str, str] = {}

    def table_files(self, table: str) -> list[FileRecord]:
        """Files of one table, in part order, also where numbers have more digits than names are filled to."""
        found = [f for f in self.files if f.table == table]
        found.sort(key=attrgetter("path"))
        found.sort(key=lambda f: len(f.path))  # stable; both together would be a tuple a file
        return found
