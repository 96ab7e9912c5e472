"""What conflict reads when gradients were never stored (`sketch.method: one_sided`): inner products with the directions.

With a_k = <g_i, G_k> and |g_i|^2 per layer group the score with the pair left out follows in closed form (scores.py);
the Gram matrix comes from the directions themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
from torch import Tensor

from schemas.errors import UserError
from stages.conflict.gate import Gate
from stages.conflict.store import answers
from stages.conflict.stream import Columns, as_slice
from stages.contract import Context
from stages.gradients.projections import SketchLayout
from stages.gradients.store import LANGUAGES_KEY, LAYOUT_KEY, common_metadata
from stages.gradients.sums import Sums

_ROWS = 4096


@dataclass(frozen=True)
class ProductStore:
    """N pairs, L languages; all float64. The products themselves are a stream: see `chunks`.

    frame: scalars of the gradients table beside `weight` (c_i) and hashes of both answers' texts. directions_LD: G;
    count_L: pairs in each. factor_N: what makes d_i the g_i of the run's metric and weights. kept_M, gate: as in `stages.conflict.store.Store`.
    """

    files: list[Path]
    kept_M: Tensor
    gate: Gate
    whole: bool
    frame: pl.DataFrame
    languages: tuple[str, ...]
    layout: SketchLayout
    directions_LD: Tensor
    count_L: Tensor
    language_N: Tensor
    omega_N: Tensor
    weight_N: Tensor
    factor_N: Tensor

    @property
    def blocks(self) -> dict[str, Columns]:
        """Sketch columns of each layer group."""
        return {name: as_slice(columns) for name, columns in self.layout.group_columns("block").items()}

    @classmethod
    def open(cls, ctx: Context) -> ProductStore:
        """Raises UserError for tables that do not belong together, or when there is no pair."""
        files, sums = ctx.inputs["gradients"], Sums.open(ctx)
        metadata = common_metadata(files)
        if json.loads(metadata.get(LANGUAGES_KEY, b"null")) != list(sums.languages):
            raise UserError(
                "The gradients were not compared with these directions",
                where=str(files[0].parent),
                fix="Redo them: --force-stage gradients.",
            )
        given = ctx.scan("contributions").select("pair_id", "part", "omega", "weight", "relevant", pair_norm="norm")
        scalars = ctx.scan("gradients").drop("products", "squares")
        for more in (given, answers(ctx)):
            scalars = scalars.join(more, on="pair_id", how="left", maintain_order="left")
        frame = scalars.collect()
        if frame.is_empty():
            raise UserError(
                "No pair has a gradient", fix="See what was dropped: congrad inspect RUN dropped/gradients."
            )
        gate = Gate.of(ctx, frame)
        frame = frame.filter(gate.passes)
        layout = SketchLayout.from_json(metadata[LAYOUT_KEY].decode())
        index = {code: n for n, code in enumerate(sums.languages)}
        weight_N, norm_N = (
            torch.tensor(frame[name].to_list(), dtype=torch.float64) for name in ("weight", "pair_norm")
        )
        factor_N = weight_N
        if ctx.config.conflict.metric == "unit":
            factor_N = torch.where(norm_N > 0, weight_N / torch.where(norm_N > 0, norm_N, 1.0), 0.0)
        return cls(
            files=files,
            kept_M=torch.tensor(gate.passes.to_list()),
            gate=gate,
            whole=ctx.config.conflict.scope == "model",
            frame=frame,
            languages=sums.languages,
            layout=layout,
            directions_LD=sums.directions(layout),
            count_L=torch.tensor([sums.n_pairs[code] for code in sums.languages]),
            language_N=torch.tensor([index[code] for code in frame["language"]], dtype=torch.int64),
            omega_N=sums.omegas(frame),
            weight_N=weight_N,
            factor_N=factor_N,
        )

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(<g_i, G_k> [n, S, L], |g_i|^2 [n, S]) of some pairs after others, in table order; S = 1, or the layer groups with
        `conflict.scope: layer`."""
        start = row = 0
        for file in self.files:
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(_ROWS, columns=["products", "squares"]):
                    square_nS = _matrix(batch.column("squares"), batch.num_rows)
                    a_nSL = _matrix(batch.column("products"), batch.num_rows).view(
                        *square_nS.shape, len(self.languages)
                    )
                    if self.whole:
                        a_nSL, square_nS = a_nSL.sum(dim=1, keepdim=True), square_nS.sum(dim=1, keepdim=True)
                    kept_n = self.kept_M[row : row + batch.num_rows]
                    row += batch.num_rows
                    factor_n = self.factor_N[start : start + int(kept_n.sum())]
                    start += len(factor_n)
                    yield a_nSL[kept_n] * factor_n[:, None, None], square_nS[kept_n] * factor_n[:, None].square()


def _matrix(column: object, rows: int) -> Tensor:
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)  # type: ignore[attr-defined]
    return torch.from_numpy(values.astype(np.float64)).view(rows, -1)
