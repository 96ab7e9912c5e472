"""The gradients table as the conflict stage reads it: scalars at once, sketches as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from schemas.errors import UserError
from stages.conflict.stream import BLOCK, Chunks, Rows
from stages.contract import Context
from stages.gradients.projections import SketchLayout
from stages.gradients.stage import LAYOUT_KEY, SEED_KEY
from stages.gradients.store import SCALE


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
        found = {
            tuple((pq.read_schema(file).metadata or {}).get(key) for key in (LAYOUT_KEY, SEED_KEY)) for file in files
        }
        if len(found) != 1 or None in next(iter(found)):
            raise UserError(
                "These gradient sketches were made with different layers or projections and cannot be compared",
                where=str(files[0].parent),
                fix="Redo them: --force-stage gradients.",
            )
        ((layout, _),) = found
        scalars = ctx.scan("gradients").drop("sketch", "ids_hash")
        answers = ctx.scan("pairs").select(
            "pair_id",
            *(pl.col(side).list.last().struct.field("content").hash().alias(side) for side in ("chosen", "rejected")),
        )
        frame = scalars.join(answers, on="pair_id", how="left", maintain_order="left").collect()
        if frame.is_empty():
            raise UserError(
                "No pair has a gradient", fix="See what was dropped: python -m pipeline inspect RUN dropped/gradients."
            )
        return cls(files, SketchLayout.from_json((layout or b"").decode()), frame)

    def chunks(self, advance: Callable[[int], None] = lambda rows: None) -> Chunks:
        """A stream over all sketches as stored, in the frame's order; `advance` is told of rows as they are used."""

        def generate() -> Iterator[Rows]:
            for rows in ahead(lambda: read_sketches(self.files)):
                yield rows
                advance(len(rows.x_ND))

        return generate


def read_sketches(files: list[Path]) -> Iterator[Rows]:
    """Stored sketches [n, D] float16 and the factors that give them their norms."""
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(BLOCK, columns=["sketch", "norm"]):
                flat = batch.column("sketch").flatten()
                factor_N = torch.from_numpy(batch.column("norm").to_numpy(zero_copy_only=False).astype("float64"))
                yield Rows(_as_tensor(flat).view(batch.num_rows, -1), factor_N / SCALE)


def ahead(read: Callable[[], Iterator[Rows]], blocks: int = 2) -> Iterator[Rows]:
    """The same rows, the next `blocks` chunks read by a thread while this one is used: Parquet is decoded meanwhile."""
    source = read()
    with ThreadPoolExecutor(1, thread_name_prefix="sketches") as pool:
        waiting = [pool.submit(next, source, None) for _ in range(blocks)]
        while (rows := waiting.pop(0).result()) is not None:
            waiting.append(pool.submit(next, source, None))
            yield rows


def _as_tensor(values: pa.Array) -> torch.Tensor:
    """A view of a float16 array without nulls."""
    return torch.from_dlpack(values)
