"""Sketches in a table come back bit for bit, by the lines that docs/tables.md gives and by ours, old tables too."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.sketches import scan_numbers, sketch_array, sketch_dim, sketch_rows, sketch_type

ROOT = Path(__file__).parents[2]


def every_float16(dim: int) -> np.ndarray:
    """All 65,536 bit patterns, NaN and infinities among them."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(-1, dim)


def as_lists(rows: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def bits(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint16)


def test_the_lines_of_the_docs_give_the_stored_bits(tmp_path: Path, monkeypatch) -> None:
    rows = every_float16(8192)
    folder = tmp_path / "runs/demo/round-0/gradients"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"pair_id": ["a"] * len(rows), "sketch": sketch_array(rows)}), folder / "part.parquet")
    page = (ROOT / "docs/tables.md").read_text()
    (code,) = re.findall(r"```python\n(import numpy.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)  # noqa: S102
    assert np.array_equal(bits(names["rows"]), bits(rows))
    assert np.array_equal(bits(names["numbers"].collect()["sketch"].to_numpy()), bits(rows))


def test_a_slice_of_a_column_is_its_rows() -> None:
    rows = every_float16(64)
    for column in (sketch_array(rows), as_lists(rows)):
        assert sketch_dim(column.type) == 64
        assert np.array_equal(bits(sketch_rows(column.slice(5, 7))), bits(rows[5:12]))
        assert sketch_rows(column.slice(3, 0)).shape == (0, 64)
    assert sketch_type(64) == pa.binary(128)


def test_a_table_made_partly_before_and_partly_after_is_read_as_one(tmp_path: Path) -> None:
    rows = every_float16(64)[:20]
    for name, column in (("0", as_lists(rows[:9])), ("1", sketch_array(rows[9:]))):
        pq.write_table(pa.table({"norm": [1.0] * len(column), "sketch": column}), tmp_path / name)
    frame = scan_numbers([tmp_path / "0", tmp_path / "1"]).collect()
    assert frame.schema["sketch"] == pl.Array(pl.Float16, 64)
    assert np.array_equal(bits(frame["sketch"].to_numpy()), bits(rows))
