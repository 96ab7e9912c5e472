"""Pair gradients as a stream that is read more than once and never held.

A chunk is a matrix of rows, or rows as they are stored beside the factor each is to be multiplied by: scaling then costs
one number a row instead of a pass over the matrix. Everything that adds up works on blocks of `BLOCK` rows, cut from the
start of the stream whatever its chunks are (or on a fixed number of these), in the precision of the rows (float32 for stored ones) with float64 totals.
So the size of the chunks changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 512
_WIDE_BYTES = 2**26


class Chunk(NamedTuple):
    """g_i = factor_N[i] * x_ND[i]; x in float16, float32 or float64, on any device; factors float64, on the CPU."""

    x_ND: Tensor
    factor_N: Tensor


Chunks = Callable[[], Iterable[Tensor | Chunk]]
"""A stream that can be read more than once: each call yields the rows of all pairs in the same order."""
Columns = Tensor | slice
"""Sketch columns of one segment (a layer group)."""


class Block(NamedTuple):
    """Consecutive rows; start: index of the first."""

    start: int
    x_ND: Tensor
    factor_N: Tensor

    @property
    def stop(self) -> int:
        return self.start + len(self.x_ND)


def as_chunk(chunk: Tensor | Chunk) -> Chunk:
    """A plain matrix has factors of one."""
    return chunk if isinstance(chunk, Chunk) else Chunk(chunk, torch.ones(len(chunk), dtype=torch.float64))


def widened(x: Tensor) -> Tensor:
    """float16 as float32 (exact); wider types as they are."""
    return x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x


def scaled_rows(x_ND: Tensor, scale_D: Tensor | None) -> Tensor:
    """scale_D * x_i in the precision sums are made in; narrower rows are widened, and only those copies are written to."""
    rows_ND = widened(x_ND)
    if scale_D is None:
        return rows_ND
    scale_D = scale_D.to(rows_ND.device, rows_ND.dtype)
    return rows_ND * scale_D if rows_ND is x_ND else rows_ND.mul_(scale_D)


def blocks(chunks: Chunks, at_once: int = 1) -> Iterator[Block]:
    """The stream cut anew into blocks of `BLOCK` rows, the last one shorter; `at_once` times as many rows where these take no more than
    `_WIDE_BYTES`, however the chunks are cut."""
    start, held, size, kept = 0, 0, BLOCK, []
    for chunk in chunks():
        x_ND, factor_N = as_chunk(chunk)
        if not start and not held:
            row_bytes = max(1, x_ND.shape[1] * x_ND.element_size())
            size = BLOCK * max(1, min(at_once, _WIDE_BYTES // (BLOCK * row_bytes)))
        while len(x_ND):
            take = size - held
            kept.append(Chunk(x_ND[:take], factor_N[:take]))
            held += len(kept[-1].x_ND)
            x_ND, factor_N = x_ND[take:], factor_N[take:]
            if held == size:
                yield _join(start, kept)
                start, held, kept = start + held, 0, []
    if held:
        yield _join(start, kept)


def on_device(chunks: Chunks, device: torch.device | None) -> Chunks:
    """The stream with its rows on a device; the same stream where that is the CPU, or None."""
    if device is None or device.type == "cpu":
        return chunks

    def generate() -> Iterator[Chunk]:
        for chunk in chunks():
            x_ND, factor_N = as_chunk(chunk)
            yield Chunk(x_ND.to(device, non_blocking=True), factor_N)

    return generate


def scaled(chunks: Chunks, weight_N: Tensor) -> Chunks:
    """The stream with row i multiplied by weight_N[i]: g_i = c_i d_i."""

    def generate() -> Iterator[Chunk]:
        start = 0
        for chunk in chunks():
            x_ND, factor_N = as_chunk(chunk)
            yield Chunk(x_ND, factor_N * weight_N[start : start + len(x_ND)].to(torch.float64))
            start += len(x_ND)

    return generate


def combined(chosen: Chunks, rejected: Chunks, sides_N2: Tensor) -> Callable[[], Iterator[Tensor]]:
    """The stream of sides_N2[i, 0] grad s_w - sides_N2[i, 1] grad s_l, from the streams of both sides' gradients."""

    def generate() -> Iterator[Tensor]:
        for up, down in zip(blocks(chosen), blocks(rejected), strict=True):
            up_ND, down_ND = widened(up.x_ND), widened(down.x_ND)
            sides_n2 = sides_N2[up.start : up.stop]
            up_n1 = (up.factor_N * sides_n2[:, 0])[:, None].to(up_ND.device, up_ND.dtype)
            down_n1 = (down.factor_N * sides_n2[:, 1])[:, None].to(down_ND.device, down_ND.dtype)
            yield up_ND * up_n1 - down_ND * down_n1

    return generate


def check_finite(result: Tensor, block: Block) -> None:
    """Raise ValueError, with the row, when `result`, made from every entry of the block, is not finite."""
    if bool(torch.isfinite(result).all()):
        return
    bad_N = ~(torch.isfinite(block.x_ND).all(dim=1).cpu() & torch.isfinite(block.factor_N))
    at = block.start + int(bad_N.nonzero()[0]) if bool(bad_N.any()) else block.start
    raise ValueError(f"the sketch of row {at} is not finite, or too long for its precision")


def as_slice(columns: Columns) -> Columns:
    """Column indices that follow each other as a slice: cut without copying."""
    if isinstance(columns, slice) or not len(columns):
        return columns
    first = int(columns[0])
    follow = torch.equal(columns, torch.arange(first, first + len(columns)))
    return slice(first, first + len(columns)) if follow else columns


def _join(start: int, kept: list[Chunk]) -> Block:
    if len(kept) == 1:
        return Block(start, *kept[0])
    return Block(start, torch.cat([rows.x_ND for rows in kept]), torch.cat([rows.factor_N for rows in kept]))
