"""The gradients table as the conflict stage reads it: scalars at once, sketches as a stream."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import torch

from schemas.errors import UserError
from stages.conflict.stream import Chunks, Rows
from stages.contract import Context
from stages.gradients.projections import SketchLayout
from stages.gradients.store import LAYOUT_KEY, SCALE, common_metadata


@dataclass(frozen=True)
class Store:
    """files, the layout their sketches share, and every other column beside hashes of both answers' texts."""

    files: list[Path]
    layout: SketchLayout
    frame: pl.DataFrame

    @classmethod
    def open(cls, ctx: Context) -> Store:
        """Raises UserError if parts were sketched differently, or there is nothing."""
        files = ctx.inputs["gradients"]
        layout = SketchLayout.from_json(common_metadata(files)[LAYOUT_KEY].decode())
        scalars = ctx.scan("gradients").drop("sketch", "sketch_chosen", "sketch_rejected", "ids_hash", strict=False)
        frame = scalars.join(answers(ctx), on="pair_id", how="left", maintain_order="left").collect()
        if frame.is_empty():
            raise UserError(
                "No pair has a gradient", fix="See what was dropped: python -m pipeline inspect RUN dropped/gradients."
            )
        return cls(files, layout, frame)

    def chunks(self, advance: Callable[[int], None] = lambda rows: None) -> Chunks:
        """A stream over all sketches as stored, in the frame's order; `advance` is told of rows as they are used."""

        def generate() -> Iterator[Rows]:
            for rows in read_sketches(self.files):
                yield rows
                advance(len(rows.x_ND))

        return generate


def answers(ctx: Context) -> pl.LazyFrame:
    """pair_id of the pairs table, and hashes of both answers' texts in chosen and rejected."""
    texts = (pl.col(side).list.last().struct.field("content").hash().alias(side) for side in ("chosen", "rejected"))
    return ctx.scan("pairs").select("pair_id", *texts)


def read_sketches(files: Sequence[Path], readers: int | None = None) -> Iterator[Rows]:
    """Stored sketches [n, D] float16 and the factors that give them their norms, a row group (about 32 MB) at a time.

    Row groups are decoded ahead by `readers` threads (None: a thread per core, at most 4), and come in order.
    Decoding takes most of the stage's time.
    """
    readers = readers or min(4, os.cpu_count() or 1)
    units = ((file, group) for file in files for group in range(pq.read_metadata(file).num_row_groups))
    with ThreadPoolExecutor(readers, thread_name_prefix="sketches") as pool:
        waiting = deque(pool.submit(_row_group, *unit) for unit in islice(units, readers + 1))
        try:
            while waiting:
                yield from waiting.popleft().result()
                waiting.extend(pool.submit(_row_group, *unit) for unit in islice(units, 1))
        finally:
            for future in waiting:
                future.cancel()


def _row_group(file: Path, group: int) -> list[Rows]:
    with pq.ParquetFile(file) as parquet:
        table = parquet.read_row_group(group, columns=["sketch", "norm"])
    found = []
    for batch in table.to_batches():
        norm_N = torch.from_numpy(batch.column("norm").to_numpy(zero_copy_only=False).astype("float64"))
        x_ND = torch.from_dlpack(batch.column("sketch").flatten()).view(batch.num_rows, -1)
        found.append(Rows(x_ND, norm_N / SCALE))
    return found
