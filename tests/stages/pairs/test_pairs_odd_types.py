"""Columns of every Arrow type, with values that Python cannot hold, give pairs and reasons or one clear error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import UserError
from stages.pairs.stage import Pairs

FAR = 2**62
COLUMNS: dict[str, pa.Array] = {
    **{f"timestamp in {unit}": pa.array([FAR, -FAR], pa.timestamp(unit)) for unit in ("ms", "us", "ns")},
    "timestamp with a zone": pa.array([FAR, -FAR], pa.timestamp("us", tz="UTC")),
    "timestamp of no zone there is": pa.array([0, 1], pa.timestamp("us", tz="Mars/Olympus")),
    "date32": pa.array([2**31 - 1, -(2**31)], pa.int32()).cast(pa.date32()),
    "date64": pa.array([FAR // 86_400_000 * 86_400_000, 0], pa.int64()).view(pa.date64()),
    "duration": pa.array([FAR, -FAR], pa.duration("s")),
    "time": pa.array([2**40, -1], pa.int64()).view(pa.time64("us")),
    "uint64": pa.array([2**64 - 1, 0], pa.uint64()),
    "decimal": pa.array(["9" * 38, "-1"]).cast(pa.decimal128(38, 0)),
    "half float": pa.array([float("nan"), float("inf")], pa.float16()),
    "binary": pa.array([b"\xff\xfe", b""], pa.binary()),
    "nested": pa.array([[{"at": FAR}], []], pa.list_(pa.struct([("at", pa.timestamp("ms"))]))),
    "a text of digits": pa.array(["9" * 5000, "-" + "9" * 5000]),
    "map": pa.array([[("a", FAR)], []], pa.map_(pa.string(), pa.timestamp("ms"))),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_any_type_in_any_column(tmp_path: Path, run_stage: Callable[..., Any], tiny_model: Path, kind: str) -> None:
    good = {
        "prompt": ["What is water?"] * 2,
        "chosen": ["Wet.", "Rain."],
        "rejected": ["Gold.", "Iron."],
        "score": [1.0, 2.0],
    }
    for column in ("prompt", "chosen", "language", "group_id", "split", "score"):
        path = tmp_path / f"{column}.parquet"
        pq.write_table(pa.table(good | {"language": ["en"] * 2, column: COLUMNS[kind]}), path)
        fields = {"split": "split"} if column == "split" else {"chosen_score": "score", "rejected_score": "score"}
        config = {
            "name": "t",
            "languages": {"seen": ["en"], "identify": False},
            "model": {"policy": "tiny"},
            "pairs": {"sources": [{"path": str(path), "fields": fields}], "on_empty_language": "skip"},
        }
        try:
            found = run_stage(Pairs(), config, model=tiny_model)
        except UserError as error:
            assert len(str(error)) < 2000
        else:
            assert len(found.rows("pairs")) + len(found.drops) == 2


def test_binary_ids_name_groups_in_hexadecimal(tmp_path: Path, run_stage: Callable[..., Any], tiny_model: Path) -> None:
    digests = [bytes([255, 0] * 8), bytes([254] * 16)]
    table = pa.table(
        {
            "prompt": [f"What is water {n}?" for n in range(3)],
            "chosen": ["Wet."] * 3,
            "rejected": ["Iron."] * 3,
            "group_id": pa.array([digests[0], digests[0], digests[1]], pa.binary(16)),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    config = {
        "name": "t",
        "languages": {"seen": ["en"], "identify": False},
        "model": {"policy": "tiny"},
        "pairs": {"sources": [{"path": str(tmp_path / "a.parquet"), "language": "en"}]},
    }
    found = run_stage(Pairs(), config, model=tiny_model).rows("pairs")
    assert sorted(pair["group_id"] for pair in found) == sorted([digests[0].hex()] * 2 + [digests[1].hex()])


def test_numbers_in_single_precision_are_the_texts_people_wrote(
    tmp_path: Path, run_stage: Callable[..., Any], tiny_model: Path
) -> None:
    path = tmp_path / "n.parquet"
    answers = {"chosen": pa.array([0.1, 1e-7], pa.float32()), "rejected": pa.array([3.14, 5.0], pa.float32())}
    pq.write_table(pa.table({"prompt": ["How much?"] * 2, "language": ["en"] * 2, **answers}), path)
    config = {
        "name": "t",
        "languages": {"seen": ["en"], "identify": False},
        "model": {"policy": "tiny"},
        "pairs": {"sources": [{"path": str(path)}], "on_empty_language": "skip"},
    }
    rows = run_stage(Pairs(), config, model=tiny_model).rows("pairs")
    said = {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows}
    assert said == {("0.1", "3.14"), ("1e-07", "5")}
