"""Very many parts: what they add up to, their order, and how they are read again."""

from __future__ import annotations

import json
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commit import write_manifest
from pipeline.history import backwards
from pipeline.parts import Parts, failed_rows
from pipeline.rundir import RunDir
from pipeline.runner import read_range
from schemas.errors import UserError
from schemas.manifests import FileRecord, PartManifest, ShardRange, StageManifest, Tally, merge_tallies
from stages.catalog import STAGES


def record(index: int, rows: int = 1, table: str = "candidates") -> FileRecord:
    return FileRecord(
        path=f"round-0/{table}/part-{index:05d}.parquet", table=table, rows=rows, bytes=1, sha256="0" * 64
    )


def part(index: int, failed: int = 0) -> PartManifest:
    tallies = [
        Tally(
            unit="prompt",
            language=language,
            rows_in=7 + index,
            kept=5,
            dropped={"tie": 2 + index - failed},
            failed=failed,
        )
        for language in ("de", "sw")[: 1 + index % 2]
    ]
    return PartManifest(
        stage="generate", round=0, index=index, fingerprint="f", files=[record(index)], tallies=tallies,
        stats={"tokens": 3.0}, seconds=0.5,
    )  # fmt: skip


def test_running_totals_are_the_sums_over_all_parts():
    every = [part(index, failed=index % 3) for index in range(20)]
    parts = Parts(every)
    assert parts.tallies() == merge_tallies(t for p in every for t in p.tallies)
    assert parts.failed() == failed_rows(t for p in every for t in p.tallies)
    assert (len(parts), parts.seconds, parts.stats) == (20, 10.0, {"tokens": 60.0})
    assert sorted(parts.failed_of) == [n for n in range(20) if n % 3]


def test_a_part_that_is_made_anew_counts_once():
    parts = Parts([part(0), part(2, failed=2), part(3)])
    parts.remove(part(2, failed=2))
    without = Parts([part(0), part(3)])
    assert 2 not in parts and parts.tallies() == without.tallies() and parts.failed() == without.failed() == []
    parts.remove(part(3))
    assert [tally.language for tally in parts.tallies()] == ["de"], "of a language that no part has there is no tally"
    parts.add(part(2))
    assert parts.tallies() == Parts([part(0), part(2)]).tallies()


def test_parts_are_in_the_order_of_their_numbers_whatever_their_digits():
    records = [record(index) for index in (100_000, 99_999, 7)]
    whole = StageManifest(stage="generate", round=0, fingerprint="f", content="c", files=records, tallies=[])
    assert whole.table_files("candidates") == [record(index) for index in (7, 99_999, 100_000)]


def test_only_a_parts_own_json_is_its_commit(tmp_path):
    spec, rundir = next(s for s in STAGES if s.name == "generate"), RunDir(tmp_path)
    for index in (7, 100_000):
        write_manifest(rundir.part_json(spec, 0, index), part(index).model_dump())
        path = tmp_path / record(index).path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    copy = rundir.state(spec, 0) / "part-00007 (copy).json"
    copy.write_bytes(rundir.part_json(spec, 0, 7).read_bytes())
    assert rundir.committed(spec, 0, "f") == {7: 0.5, 100_000: 0.5}
    assert list(rundir.parts(spec, 0, [7, 100_000]).files) == [7, 100_000]
    rundir.forget_parts(spec, 0, but={100_000})
    assert [p.name for p in rundir.state(spec, 0).glob("*")] == ["part-100000.json"]


def test_a_part_that_is_there_and_cannot_be_added_up_is_refused(tmp_path):
    """Planning does not read tallies."""
    spec, rundir = next(s for s in STAGES if s.name == "generate"), RunDir(tmp_path)
    (tmp_path / record(7).path).parent.mkdir(parents=True)
    (tmp_path / record(7).path).write_bytes(b"x")
    values = part(7).model_dump()
    for wrong in ({"tallies": [values["tallies"][0] | {"kept": 6}]}, {"tallies": [{}]}, {"other": 1}):
        write_manifest(rundir.part_json(spec, 0, 7), values | wrong)
        assert list(rundir.committed(spec, 0, "f")) == [7]
        with pytest.raises(UserError, match=r"cannot be read.*part-00007\.json.*Delete the file"):
            rundir.parts(spec, 0, [7])
    rundir.part_json(spec, 0, 7).write_text('{"version": 1, "index": 7')  # torn: made again
    assert not rundir.committed(spec, 0, "f")


def test_a_range_of_rows_is_read_across_files_and_past_empty_ones(tmp_path):
    records, rows = [], [3, 0, 4, 0, 0, 2]
    for index, count in enumerate(rows):
        records.append(record(index, count))
        path = tmp_path / records[-1].path
        path.parent.mkdir(parents=True, exist_ok=True)
        begin = sum(rows[:index])
        pq.write_table(pa.table({"x": pa.array(range(begin, begin + count), pa.int64())}), path)
    ends = list(accumulate(rows))
    for start in range(9):
        for stop in range(start + 1, 10):
            got = read_range(tmp_path, records, ends, ShardRange(index=0, start=start, stop=stop))
            assert got["x"].to_pylist() == list(range(start, stop))


def test_events_are_read_from_the_end_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.history._BLOCK", 7)
    events = [{"event": "note", "message": "ä" * n} for n in range(9)]
    text = "\n".join(json.dumps(event, ensure_ascii=False) for event in events)
    (tmp_path / "events.jsonl").write_text(text + "\nnot whole", encoding="utf-8")
    assert list(backwards(tmp_path)) == events[::-1]
