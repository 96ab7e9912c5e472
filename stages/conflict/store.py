"""The gradients table as the conflict stage reads it: scalars at once, sketches as a stream."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import torch
from torch import Tensor

from schemas.errors import UserError
from stages.conflict.stream import Chunks, Rows, combined
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
        answers = ctx.scan("pairs").select(
            "pair_id",
            *(pl.col(side).list.last().struct.field("content").hash().alias(side) for side in ("chosen", "rejected")),
        )
        frame = scalars.join(answers, on="pair_id", how="left", maintain_order="left").collect()
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

    def sides(self, sides_N2: Tensor, advance: Callable[[int], None] = lambda rows: None) -> Chunks:
        """The same of sides_N2[i, 0] grad s_w - sides_N2[i, 1] grad s_l. Raises UserError if the sides were not stored."""
        if "sketch_chosen" not in pq.read_schema(self.files[0]).names:
            raise UserError(
                "This loss weighs the gradients of chosen and rejected apart, and only their difference is stored",
                where="loss.type",
                fix="Set gradients.sketch.both_sides: true, or conflict.weighting: none to curate by the difference.",
            )
        chosen, rejected = (partial(read_sketches, self.files, side=f"_{side}") for side in ("chosen", "rejected"))

        def generate() -> Iterator[Tensor]:
            for rows_ND in combined(chosen, rejected, sides_N2)():
                yield rows_ND
                advance(len(rows_ND))

        return generate


def read_sketches(files: Sequence[Path], readers: int | None = None, side: str = "") -> Iterator[Rows]:
    """Stored sketches [n, D] float16 and the factors that give them their norms, a row group (about 32 MB) at a time.

    Row groups are decoded ahead by `readers` threads (None: a thread per core, at most 4), and come in order.
    Decoding takes most of the stage's time. side: "", "_chosen" or "_rejected".
    """
    readers = readers or min(4, os.cpu_count() or 1)
    units = ((file, group) for file in files for group in range(pq.read_metadata(file).num_row_groups))
    with ThreadPoolExecutor(readers, thread_name_prefix="sketches") as pool:
        waiting = deque(pool.submit(_row_group, *unit, side) for unit in islice(units, readers + 1))
        try:
            while waiting:
                yield from waiting.popleft().result()
                waiting.extend(pool.submit(_row_group, *unit, side) for unit in islice(units, 1))
        finally:
            for future in waiting:
                future.cancel()


def _row_group(file: Path, group: int, side: str) -> list[Rows]:
    with pq.ParquetFile(file) as parquet:
        table = parquet.read_row_group(group, columns=[f"sketch{side}", f"norm{side}"])
    found = []
    for batch in table.to_batches():
        norm_N = torch.from_numpy(batch.column(f"norm{side}").to_numpy(zero_copy_only=False).astype("float64"))
        x_ND = torch.from_dlpack(batch.column(f"sketch{side}").flatten()).view(batch.num_rows, -1)
        found.append(Rows(x_ND, norm_N / SCALE))
    return found
