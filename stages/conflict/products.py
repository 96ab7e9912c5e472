"""What conflict reads when gradients were never stored (`sketch.method: one_sided`): inner products with the directions.

With a_k = <g_i, G_k> and |g_i|^2 per layer group the score with the pair left out follows in closed form (scores.py);
the Gram matrix comes from the directions themselves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
from torch import Tensor

from schemas.errors import UserError
from stages.contract import Context
from stages.gradients.projections import SketchLayout
from stages.gradients.store import LANGUAGES_KEY, LAYOUT_KEY, common_metadata
from stages.gradients.sums import Sums


@dataclass(frozen=True)
class ProductStore:
    """N pairs, S segments (1, or the layer groups with `conflict.scope: layer`), L languages; all float64.

    frame: scalars of the gradients table beside `weight` (c_i). a_NSL, square_NS: of g_i, in the metric and weighted.
    directions_LD: G; count_L: pairs in each.
    """

    frame: pl.DataFrame
    languages: tuple[str, ...]
    layout: SketchLayout
    directions_LD: Tensor
    count_L: Tensor
    language_N: Tensor
    omega_N: Tensor
    weight_N: Tensor
    a_NSL: Tensor
    square_NS: Tensor

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
        given = ctx.scan("contributions").select("pair_id", "part", "omega", "weight", pair_norm="norm")
        scalars = ctx.scan("gradients").drop("products", "squares")
        frame = scalars.join(given, on="pair_id", how="left", maintain_order="left").collect()
        if frame.is_empty():
            raise UserError(
                "No pair has a gradient", fix="See what was dropped: python -m pipeline inspect RUN dropped/gradients."
            )
        layout = SketchLayout.from_json(metadata[LAYOUT_KEY].decode())
        index = {code: n for n, code in enumerate(sums.languages)}
        weight_N, norm_N = (
            torch.tensor(frame[name].to_list(), dtype=torch.float64) for name in ("weight", "pair_norm")
        )
        factor_N = weight_N
        if ctx.config.conflict.metric == "unit":
            factor_N = torch.where(norm_N > 0, weight_N / torch.where(norm_N > 0, norm_N, 1.0), 0.0)
        a_NSL, square_NS = _products(ctx, len(sums.languages))
        return cls(
            frame=frame,
            languages=sums.languages,
            layout=layout,
            directions_LD=sums.directions(layout),
            count_L=torch.tensor([sums.n_pairs[code] for code in sums.languages]),
            language_N=torch.tensor([index[code] for code in frame["language"]], dtype=torch.int64),
            omega_N=sums.omegas(frame),
            weight_N=weight_N,
            a_NSL=a_NSL * factor_N[:, None, None],
            square_NS=square_NS * factor_N[:, None].square(),
        )


def _products(ctx: Context, n_languages: int) -> tuple[Tensor, Tensor]:
    """The stored (a [N, S, L], |g|^2 [N, S]) of the unweighted gradients, in table order."""
    whole = ctx.config.conflict.scope == "model"
    found: list[tuple[Tensor, Tensor]] = []
    for file in ctx.inputs["gradients"]:
        for batch in pq.ParquetFile(file).iter_batches(columns=["products", "squares"]):
            square_nS = _matrix(batch.column("squares"), batch.num_rows)
            a_nSL = _matrix(batch.column("products"), batch.num_rows).view(*square_nS.shape, n_languages)
            if whole:
                a_nSL, square_nS = a_nSL.sum(dim=1, keepdim=True), square_nS.sum(dim=1, keepdim=True)
            found.append((a_nSL, square_nS))

    return torch.cat([a for a, _ in found]), torch.cat([square for _, square in found])


def _matrix(column: object, rows: int) -> Tensor:
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)  # type: ignore[attr-defined]
    return torch.from_numpy(values.astype(np.float64)).view(rows, -1)
