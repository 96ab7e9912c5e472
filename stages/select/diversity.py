"""Cells of pairs whose gradients point alike: k-means over the sketches, so that no cell fills the selection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import faiss
import numpy as np
import polars as pl
import pyarrow.parquet as pq

from schemas.ids import seed_for
from schemas.sketches import sketch_rows

_ROWS = 1024
_SAMPLE_BYTES = 2**29
_PER_CELL = 256
_ITERATIONS = 20


def cells(files: Sequence[Path], k: int, seed: Sequence[object] = (0,)) -> pl.DataFrame:
    """pair_id and cell (0 .. k-1) of every pair of the gradients table.

    Spherical k-means (faiss) of the sketches at unit length, fitted on at most 256 pairs a cell and 512 MB, drawn by
    seed and place in the table; then every pair goes to its nearest centre, in one pass that holds no sketches. The same
    files and seed give the same cells. Fewer pairs than k: that many cells.
    """
    total = sum(pq.read_metadata(file).num_rows for file in files)
    if not total:
        return pl.DataFrame(schema={"pair_id": pl.String, "cell": pl.Int64})
    k = min(k, total)
    width = next(unit_sketches(files))[1].shape[1]
    size = min(total, max(k, min(_PER_CELL * k, _SAMPLE_BYTES // (4 * width))))
    number = seed_for(*seed, "cells") % 2**31
    chosen = np.sort(np.random.default_rng(number).choice(total, size, replace=False))
    sample, start = np.empty((size, width), np.float32), 0
    for _, rows in unit_sketches(files):
        low, high = np.searchsorted(chosen, [start, start + len(rows)])
        sample[low:high] = rows[chosen[low:high] - start]
        start += len(rows)
    means = faiss.Kmeans(
        width,
        k,
        niter=_ITERATIONS,
        seed=number,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=size,
    )
    means.train(sample)
    del sample
    found: list[pl.DataFrame] = []
    for ids, rows in unit_sketches(files):
        _, nearest = means.index.search(rows, 1)
        found.append(pl.DataFrame({"pair_id": ids, "cell": nearest[:, 0]}))
    return pl.concat(found)


def unit_sketches(files: Sequence[Path]) -> Iterator[tuple[list[str], np.ndarray]]:
    """(pair ids, sketches at unit length [n, D] float32) in the table's order; a zero sketch stays zero."""
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(_ROWS, columns=["pair_id", "sketch"]):
                rows = sketch_rows(batch.column("sketch")).astype(np.float32)
                norm = np.linalg.norm(rows, axis=1, keepdims=True)
                yield batch.column("pair_id").to_pylist(), rows / np.where(norm > 0, norm, 1.0)
