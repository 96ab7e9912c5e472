"""The commit protocol of a part: its files first, its JSON last. A part without its JSON does not exist."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
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


class TableWriter:
    """Writes one table's part under a temporary name in row groups of about 32 MB; publishes it when closed."""

    def __init__(self, rundir: RunDir, final: Path, table: str) -> None:
        self._rundir, self._final, self._table = rundir, final, table
        files.make_folder(rundir.temporary)
        self._temporary = rundir.temporary / f"{uuid.uuid4().hex}.parquet"
        self._writer: pq.ParquetWriter | None = None
        self._pending: list[pa.Table] = []
        self._rows = 0

    def write(self, data: pa.Table) -> None:
        """Append rows. Raises ValueError if they do not fit the table's documented schema."""
        fixed = schema_of(self._table)
        if fixed is not None:
            data = conform(data, fixed, self._table)
        self._pending.append(data)
        self._rows += data.num_rows
        if sum(t.nbytes for t in self._pending) >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        merged = pa.concat_tables(self._pending)
        self._pending = []
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._temporary, merged.schema, **_encoding(merged.schema))
        rows = max(1, int(merged.num_rows * ROW_GROUP_BYTES / max(merged.nbytes, 1)))
        self._writer.write_table(merged, row_group_size=rows)

    def close(self) -> FileRecord:
        """Publish the part and describe it."""
        self._flush()
        if self._writer is None:
            raise ValueError(f"no rows were written to {self._table}, not even an empty table")
        self._writer.close()
        files.publish(self._temporary, self._final)
        return files.record(self._rundir.root, self._final, self._table, self._rows)


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    """Compressed, but for raw numbers (fixed-size binary): they gain a tenth by it and are read six times slower."""
    raw = {field.name for field in schema if pa.types.is_fixed_size_binary(field.type)}
    if not raw:
        return {"compression": "zstd"}
    others = [name for name in schema.names if name not in raw]
    return {"compression": {**dict.fromkeys(others, "zstd"), **dict.fromkeys(raw, "none")}, "use_dictionary": others}


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


def keep_refused(rundir: RunDir, spec: StageSpec, round_: int, drops: Sequence[Drop]) -> None:
    """Write the dropped rows of a stage that refuses to go on, for `inspect`: no commit, nothing reads them but people."""
    writer = TableWriter(rundir, refused_path(rundir, spec, round_), "dropped")
    writer.write(drops_table(drops))
    writer.close()


def retract_refused(rundir: RunDir, spec: StageSpec, round_: int) -> None:
    """Forget an earlier refusal."""
    files.remove([refused_path(rundir, spec, round_)])


def retract_part(rundir: RunDir, spec: StageSpec, round_: int, index: int) -> None:
    """Take back the commit of a part that is made anew, before its files are replaced: its hashes are of the old ones."""
    files.remove([rundir.state(spec, round_) / f"part-{index:05d}.json"])


def commit_part(
    rundir: RunDir,
    spec: StageSpec,
    round_: int,
    index: int,
    fingerprint: str,
    *,
    records: Iterable[FileRecord],
    drops: Sequence[Drop],
    tallies: list[Tally],
    stats: dict[str, float],
    seconds: float,
) -> PartManifest:
    """Write the dropped rows, check the account against what is in the files, and write the part's JSON last."""
    records = list(records)
    dropped = sum(sum(t.dropped.values()) + t.failed for t in tallies)
    if dropped != len(drops):
        raise ValueError(
            f"{spec.name}: the account says {dropped} dropped or failed, but {len(drops)} rows name a reason"
        )
    _check_kept(spec, records, tallies)
    if drops:
        writer = TableWriter(rundir, rundir.table(spec, round_, "dropped") / part_name(index), "dropped")
        writer.write(drops_table(drops))
        records.append(writer.close())
    part = PartManifest(
        stage=spec.name,
        round=round_,
        index=index,
        fingerprint=fingerprint,
        files=records,
        tallies=tallies,
        stats=stats,
        seconds=round(seconds, 3),
    )
    write_manifest(rundir.state(spec, round_) / f"part-{index:05d}.json", part.model_dump())
    return part


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
