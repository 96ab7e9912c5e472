"""Optional metric: a frozen diagonal scaling of sketch space, fitted in one pass over the pairs.

Pairs go to unit norm, then every sketch coordinate is divided by max(RMS over pairs, floor)^q, or every layer by
the RMS of its coordinates. It balances layers, a few of which hold most of the squared norm; it is not Adam's
preconditioner (that acts before projection). The scaling is not recomputed under leave-one-out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stages.conflict.stream import Chunk, Chunks, as_chunk, blocks, check_finite, widened

_ROWS = 256
MetricName = Literal["none", "unit", "coordinate", "layer"]


@dataclass(frozen=True)
class Metric:
    """Row scaling to unit norm, when `unit`, then multiplication by `scale_D` [D] float64 (None: nothing)."""

    unit: bool
    scale_D: Tensor | None

    def __call__(self, chunk_ND: Tensor) -> Tensor:
        """Scaled rows [N, D], float64; a zero row stays zero."""
        rows_ND = unit_rows(chunk_ND) if self.unit else chunk_ND.to(torch.float64)
        return rows_ND if self.scale_D is None else rows_ND * self.scale_D

    def stream(self, chunks: Chunks) -> Chunks:
        """The stream in this metric but for `scale_D`, which whoever sums or compares applies: it costs less there. Apply it to
        d_i, before the loss weights c_i: unit norm would undo them. Norms are taken once: a second reading finds them."""
        if not self.unit:
            return chunks
        taken_N = torch.empty(0, dtype=torch.float64)

        def generate() -> Iterator[Chunk]:
            nonlocal taken_N
            known, start, fresh = len(taken_N) > 0, 0, list[Tensor]()
            for chunk in chunks():
                x_ND, factor_N = as_chunk(chunk)
                stop = start + len(x_ND)
                inverse_N = taken_N[start:stop] if known else inverse_norms(x_ND) * (factor_N != 0)
                if not known:
                    fresh.append(inverse_N)
                start = stop
                yield Chunk(x_ND, inverse_N)
            if not known and fresh:
                taken_N = torch.cat(fresh)

        return generate


def inverse_norms(x_ND: Tensor) -> Tensor:
    """1 / |x_i| [N], float64, on the CPU; 0 for a zero row."""
    few = x_ND.split(_ROWS)  # whose widened copy stays near the cores
    norm_N = torch.cat([torch.linalg.vector_norm(widened(x_nD), dim=1) for x_nD in few]).to(torch.float64).cpu()
    return torch.where(norm_N > 0, 1.0 / torch.where(norm_N > 0, norm_N, 1.0), 0.0)


def unit_rows(chunk_ND: Tensor) -> Tensor:
    """Rows at unit norm, float64; a zero row stays zero."""
    wide_ND = chunk_ND.to(torch.float64)
    norm_N1 = torch.linalg.vector_norm(wide_ND, dim=1, keepdim=True)
    return wide_ND / torch.where(norm_N1 > 0, norm_N1, 1.0)


def fit_metric(
    chunks: Chunks,
    kind: MetricName,
    *,
    q: float = 0.5,
    floor: float = 1e-3,
    layers: Sequence[slice] = (),
) -> Metric:
    """Fit a metric. `none` and `unit` need no pass.

    coordinate: divide by max(RMS, floor * r)^q, where r is the RMS of all coordinates together, so that `floor` has
    no unit. layer: divide every layer (column slices `layers`, which cover D) by max(RMS of its coordinates, floor
    * r); q is not used. Raises ValueError for an unknown kind, q < 0, floor <= 0, layers that do not cover D, or
    only zero sketches.
    """
    if kind in ("none", "unit"):
        return Metric(kind == "unit", None)
    if kind not in ("coordinate", "layer"):
        raise ValueError(f"unknown metric {kind!r}; known: none, unit, coordinate, layer")
    if q < 0 or floor <= 0:
        raise ValueError(f"the metric needs q >= 0 and floor > 0, got q = {q}, floor = {floor}")
    sum_D: Tensor | None = None
    rows = 0
    for block in blocks(chunks):
        x_ND = widened(block.x_ND)
        inverse_N = inverse_norms(x_ND) * (block.factor_N != 0)
        rows += int((inverse_N > 0).sum())
        square_ND = x_ND.square() if x_ND is block.x_ND else x_ND.square_()
        part_D = inverse_N.square().to(x_ND.device, x_ND.dtype) @ square_ND
        check_finite(part_D, block)
        part_D = part_D.to(torch.float64).cpu()
        sum_D = part_D if sum_D is None else sum_D + part_D
    if sum_D is None or rows == 0:
        raise ValueError("a metric cannot be fitted: every sketch is zero")
    square_D = sum_D / rows
    overall = square_D.mean().sqrt()
    if kind == "coordinate":
        return Metric(True, square_D.sqrt().clamp_min(floor * overall) ** -q)
    if sum(s.stop - s.start for s in layers) != square_D.shape[0]:
        raise ValueError("the layers do not cover the sketch's columns")
    scale_D = torch.empty_like(square_D)
    for columns in layers:
        scale_D[columns] = 1.0 / square_D[columns].mean().sqrt().clamp_min(floor * overall)
    return Metric(True, scale_D)
