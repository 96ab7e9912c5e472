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
from schemas.sketches import sketch_values
from stages.conflict.gate import Gate
from stages.conflict.stream import Chunk, Chunks, combined
from stages.contract import Context
from stages.gradients.projections import SketchLayout
from stages.gradients.store import LAYOUT_KEY, SCALE, common_metadata

SAMPLE = 65_536
"""Pairs a metric is fitted on, at most: its scales are means over pairs, right to under 1% with so many."""
_WINDOWS = 32


@dataclass(frozen=True)
class Store:
    """files, the layout their sketches share, and every other column beside hashes of both answers' texts.

    frame: the pairs that are compared; kept_M: which of the files' rows these are; gate: those that the relevance gate holds back.
    """

    files: list[Path]
    layout: SketchLayout
    frame: pl.DataFrame
    kept_M: Tensor
    gate: Gate

    @classmethod
    def open(cls, ctx: Context) -> Store:
        """Raises UserError if parts were sketched differently, or there is nothing to compare."""
        files = ctx.inputs["gradients"]
        layout = SketchLayout.from_json(common_metadata(files)[LAYOUT_KEY].decode())
        scalars = ctx.scan("gradients").drop("sketch", "sketch_chosen", "sketch_rejected", "ids_hash", strict=False)
        frame = scalars.join(answers(ctx), on="pair_id", how="left", maintain_order="left").collect()
        if frame.is_empty():
            raise UserError(
                "No pair has a gradient", fix="See what was dropped: congrad inspect RUN dropped/gradients."
            )
        if not (frame["norm"] != 0).any():
            raise UserError(
                "The gradient of every pair is zero: there is nothing to compare",
                where=str(files[0].parent),
                fix="Look at the pairs (both answers may be the same to the model) and at gradients.sketch.include.",
            )
        gate = Gate.of(ctx, frame)
        return cls(files, layout, frame.filter(gate.passes), torch.tensor(gate.passes.to_list()), gate)

    @property
    def windows(self) -> list[range]:
        """Rows of the files that a metric is fitted on."""
        return sample_windows(len(self.kept_M))

    def chunks(
        self,
        advance: Callable[[int], None] = lambda rows: None,
        *,
        sides_N2: Tensor | None = None,
        windows: Sequence[range] | None = None,
    ) -> Chunks:
        """A stream over sketches as stored, in the frame's order; `advance` is told of rows as they are used.

        sides_N2: sides_N2[i, 0] grad s_w - sides_N2[i, 1] grad s_l instead of the difference; windows: only these rows of the files.
        Raises UserError if the sides were not stored.
        """
        if sides_N2 is None:
            return _counted(self._read(windows), advance)
        if "sketch_chosen" not in pq.read_schema(self.files[0]).names:
            raise UserError(
                "This loss weighs the gradients of chosen and rejected apart, and only their difference is stored",
                where="loss.type",
                fix="Set gradients.sketch.both_sides: true, or conflict.weighting: none to curate by the difference.",
            )
        if windows is not None:
            place_M = self.kept_M.cumsum(0) - 1
            rows = torch.cat([torch.arange(window.start, window.stop) for window in windows])
            sides_N2 = sides_N2[place_M[rows[self.kept_M[rows]]]]
        chosen, rejected = (self._read(windows, f"_{side}") for side in ("chosen", "rejected"))
        return _counted(combined(chosen, rejected, sides_N2), advance)

    def _read(self, windows: Sequence[range] | None, side: str = "") -> Callable[[], Iterator[Chunk]]:
        """Sketches of the frame's pairs."""
        read = partial(read_sketches, self.files, windows=windows, side=side)
        if bool(self.kept_M.all()):
            return read
        kept_M = self.kept_M
        if windows is not None:
            kept_M = torch.cat([kept_M[window.start : window.stop] for window in windows])

        def generate() -> Iterator[Chunk]:
            start = 0
            for x_ND, factor_N in read():
                kept_n = kept_M[start : start + len(x_ND)]
                start += len(x_ND)
                yield Chunk(x_ND[kept_n], factor_N[kept_n])

        return generate


def _counted(chunks: Chunks, advance: Callable[[int], None]) -> Chunks:
    def generate() -> Iterator[Tensor | Chunk]:
        for chunk in chunks():
            yield chunk
            advance(len(chunk.x_ND if isinstance(chunk, Chunk) else chunk))

    return generate


def sample_windows(n: int) -> list[range]:
    """Rows a metric is fitted on: all up to SAMPLE, else windows of equal size at equal distances. They do not depend on how
    the table is cut into parts."""
    if n <= SAMPLE:
        return [range(n)]
    size = SAMPLE // _WINDOWS
    return [range(start, start + size) for start in (w * (n - size) // (_WINDOWS - 1) for w in range(_WINDOWS))]


def answers(ctx: Context) -> pl.LazyFrame:
    """pair_id of the pairs table, and hashes of both answers' texts in chosen and rejected."""
    texts = (pl.col(side).list.last().struct.field("content").hash().alias(side) for side in ("chosen", "rejected"))
    return ctx.scan("pairs").select("pair_id", *texts)


def read_sketches(
    files: Sequence[Path], readers: int | None = None, windows: Sequence[range] | None = None, side: str = ""
) -> Iterator[Chunk]:
    """Stored sketches [n, D] float16 and the factors that give them their norms, a row group (about 32 MB) at a time.

    Row groups are decoded ahead by `readers` threads (None: a thread per core, at most 4), and come in order.
    Decoding takes most of the stage's time. windows: rows to read, ascending and apart; None: all. side: "", "_chosen" or
    "_rejected".
    """
    readers = readers or min(4, os.cpu_count() or 1)
    units = _units(files, windows)
    with ThreadPoolExecutor(readers, thread_name_prefix="sketches") as pool:
        waiting = deque(pool.submit(_row_group, *unit, side) for unit in islice(units, readers + 1))
        try:
            while waiting:
                yield from waiting.popleft().result()
                waiting.extend(pool.submit(_row_group, *unit, side) for unit in islice(units, 1))
        finally:
            for future in waiting:
                future.cancel()


def _units(files: Sequence[Path], windows: Sequence[range] | None) -> Iterator[tuple[Path, int, int, int | None]]:
    """(file, row group, first row in it, how many: None for all)."""
    start = 0
    for file in files:
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).num_rows
            if windows is None:
                yield file, group, 0, None
            else:
                for window in windows:
                    first, stop = max(window.start, start), min(window.stop, start + size)
                    if first < stop:
                        yield file, group, first - start, stop - first
            start += size


def _row_group(file: Path, group: int, first: int, count: int | None, side: str) -> list[Chunk]:
    with pq.ParquetFile(file) as parquet:
        table = parquet.read_row_group(group, columns=[f"sketch{side}", f"norm{side}"]).slice(first, count)
    found = []
    for batch in table.to_batches():
        norm_N = torch.from_numpy(batch.column(f"norm{side}").to_numpy(zero_copy_only=False).astype("float64"))
        x_ND = torch.from_dlpack(sketch_values(batch.column(f"sketch{side}"))).view(batch.num_rows, -1)
        found.append(Chunk(x_ND, norm_N / SCALE))
    return found
