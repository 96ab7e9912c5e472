"""Curated pairs as a `datasets.Dataset`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.tables import TABLES

if TYPE_CHECKING:
    from datasets import Dataset


def as_dataset(files: Sequence[Path]) -> Dataset:
    """The rows of a table's files in order, in memory: no cache folder, and no copy of the data beside it."""
    from datasets import Dataset

    tables = [pq.ParquetFile(file).read() for file in files]
    return Dataset(pa.concat_tables(tables) if tables else TABLES["curated"].schema.empty_table())
