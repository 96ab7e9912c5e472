"""The commit protocol of a part: its files first, its JSON last. A part without its JSON does not exist.

A worker prepares a part under temporary names and offers it; the driver commits it while that worker holds the shard. So a
worker that was given up and wakes again can damage nothing.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.rundir import RunDir
from schemas import files
from schemas.manifests import FileRecord, PartManifest, Tally
from schemas.tables import TABLES, schema_of
from stages.contract import Drop
from stages.spec import StageSpec

ROW_GROUP_BYTES = 32 * 2**20
_MAX_ROWS_PER_FILE = 1_000_000


@dataclass(frozen=True)
class PreparedPart:
    """A part whose files are whole and flushed, tables under temporary names: it does not exist before `commit`.

    moves: (temporary, own) name of every table's file, relative to the run directory.
    """

    manifest: PartManifest
    moves: tuple[tuple[str, str], ...]

    @property
    def index(self) -> int:
        """Which shard it is."""
        return self.manifest.index


class TableWriter:
    """Writes one table's part under a temporary name, in row groups of about 32 MB."""

    def __init__(self, scratch: Path, table: str) -> None:
        self._table = table
        self.temporary = scratch / f"{uuid.uuid4().hex}.parquet"
        self._writer: pq.ParquetWriter | None = None
        self._pending: list[pa.Table] = []
        self.rows = 0

    def write(self, data: pa.Table) -> None:
        """Append rows. Raises ValueError if they do not fit the table's documented schema."""
        fixed = schema_of(self._table)
        if fixed is not None:
            data = conform(data, fixed, self._table)
        self._pending.append(data)
        self.rows += data.num_rows
        if sum(t.nbytes for t in self._pending) >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        group = pa.concat_tables(self._pending)
        self._pending = []
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.temporary, group.schema, compression="zstd")
        rows = max(1, int(group.num_rows * ROW_GROUP_BYTES / max(group.nbytes, 1)))
        self._writer.write_table(group, row_group_size=rows)

    def close(self) -> None:
        """Finish the file and flush it to disk. Raises ValueError if nothing was written, not even an empty table."""
        self._flush()
        if self._writer is None:
            raise ValueError(f"no rows were written to {self._table}, not even an empty table")
        self._writer.close()
        files.fsync(self.temporary)


class PartBuilder:
    """Writes what a part is made of under temporary names in `scratch`, and checks its account.

    A part of a stage that is not cut into shards has a file per million rows of each table.
    """

    def __init__(
        self, rundir: RunDir, spec: StageSpec, round_: int, index: int, fingerprint: str, scratch: Path
    ) -> None:
        self._rundir, self._spec, self._round, self._index = rundir, spec, round_, index
        self._fingerprint, self._scratch = fingerprint, scratch
        self._open: dict[str, TableWriter] = {}
        self._files: Counter[str] = Counter()
        self._moves: list[tuple[str, str]] = []
        self._records: list[FileRecord] = []

    @property
    def tables(self) -> set[str]:
        """Tables that were written, perhaps without a row."""
        return set(self._files)

    def write(self, table: str, data: pa.Table) -> None:
        """Append rows of a table. Raises ValueError for a table that is not the stage's."""
        if table not in self._spec.writes:
            raise ValueError(f"{self._spec.name} may not write {table}")
        if self._spec.kind != "shard" and table in self._open and self._open[table].rows >= _MAX_ROWS_PER_FILE:
            self._close(table)
        self._append(table, data)

    def add_artifacts(self, paths: Iterable[Path], folder: Path | None) -> None:
        """Files of the stage's own folder, which lie under their own names already: flushed with the folders they are in."""
        paths = list(paths)
        for path in paths:
            files.fsync(path)
            self._records.append(files.record(self._rundir.root, path))
        for inner in {parent for path in paths for parent in path.parents if folder and parent.is_relative_to(folder)}:
            files.fsync(inner)

    def finish(
        self, tallies: list[Tally], drops: Sequence[Drop], stats: dict[str, float], seconds: float
    ) -> PreparedPart:
        """The part. Raises ValueError for an account that does not fit what is in the files."""
        for table in list(self._open):
            self._close(table)
        dropped = sum(sum(t.dropped.values()) + t.failed for t in tallies)
        if dropped != len(drops):
            raise ValueError(
                f"{self._spec.name}: the account says {dropped} dropped or failed, but {len(drops)} rows name a reason"
            )
        _check_kept(self._spec, self._records, tallies)
        if drops:
            self._append("dropped", drops_table(drops))
            self._close("dropped")
        manifest = PartManifest(
            stage=self._spec.name,
            round=self._round,
            index=self._index,
            fingerprint=self._fingerprint,
            files=self._records,
            tallies=tallies,
            stats=stats,
            seconds=round(seconds, 3),
        )
        return PreparedPart(manifest, tuple(self._moves))

    def _append(self, table: str, data: pa.Table) -> None:
        if table not in self._open:
            self._open[table] = TableWriter(self._scratch, table)
            self._files[table] += 1
        self._open[table].write(data)

    def _close(self, table: str) -> None:
        writer = self._open.pop(table)
        writer.close()
        number = self._index if self._spec.kind == "shard" else self._files[table] - 1
        own = self._rundir.table(self._spec, self._round, table) / part_name(number)
        written = files.record(self._rundir.root, writer.temporary, table, writer.rows)
        record = replace(written, path=own.relative_to(self._rundir.root).as_posix())
        self._records.append(record)
        self._moves.append((written.path, record.path))


def conform(data: pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    """The same rows in the documented column order and types.

    Raises ValueError on a missing or an undocumented column, or a null where none is allowed.
    """
    if set(data.column_names) != set(schema.names):
        raise ValueError(f"{name}: columns {data.column_names} are not the documented {schema.names}")
    return data.select(schema.names).cast(schema)


def drops_table(drops: Sequence[Drop]) -> pa.Table:
    """Dropped rows as the documented table."""
    schema = TABLES["dropped"].schema
    return pa.table({name: [getattr(drop, name) for drop in drops] for name in schema.names}, schema=schema)


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def refused_path(rundir: RunDir, spec: StageSpec, round_: int) -> Path:
    """Where the dropped rows of a stage are that could not go on with what it kept."""
    return rundir.state(spec, round_) / "refused.parquet"


def keep_refused(path: Path, drops: Sequence[Drop], scratch: Path) -> None:
    """Write the dropped rows of a stage that refuses to go on, for `inspect`: no commit, nothing reads them but people."""
    writer = TableWriter(scratch, "dropped")
    writer.write(drops_table(drops))
    writer.close()
    files.move([(writer.temporary, path)])


def commit(rundir: RunDir, spec: StageSpec, part: PreparedPart) -> None:
    """Make a prepared part exist: an earlier commit is taken back first, since its hashes are of other files; then the files get
    their names; then its JSON is written, and what its worker left of it meanwhile goes."""
    commit_of = rundir.part_json(spec, part.manifest.round, part.index)
    files.remove([commit_of])
    files.move([(rundir.root / temporary, rundir.root / own) for temporary, own in part.moves])
    write_manifest(commit_of, part.manifest.model_dump())
    files.remove([rundir.unfinished(spec, part.manifest.round, part.manifest.fingerprint, part.index)])


def withdraw(root: Path, part: PreparedPart) -> None:
    """Delete the files of a part that is not committed."""
    files.remove(root / temporary for temporary, _ in part.moves)


def _check_kept(spec: StageSpec, records: Sequence[FileRecord], tallies: Sequence[Tally]) -> None:
    """Kept rows are counted in the files, not taken from the account: it follows from what was dropped."""
    if spec.kept_rows is None:
        return
    units, table = spec.kept_rows
    said = sum(tally.kept for tally in tallies if tally.unit in units)
    written = sum(record.rows or 0 for record in records if record.table == table)
    if said != written:
        raise ValueError(f"{spec.name}: the account says {said} {units[0]}s kept, but {table} has {written} rows")


def write_manifest(path: Path, value: dict[str, Any]) -> None:
    """Write a manifest: plan, part or stage."""
    files.write_json(path, json.loads(json.dumps(value)))
