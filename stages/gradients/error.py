"""How far sketching moves cosines, measured: the same pairs with two seeds (docs/methods.md section 3)."""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from stages.contract import Context


def cosine_error(first_ND: Tensor, second_ND: Tensor) -> dict[str, float]:
    """Statistics of the cosines between all pairs of rows under two independent projections.

    With x = truth + e and y = truth + f, e and f independent with the same variance, E (x - y)^2 = 2 Var e:
    `sketch_cosine_error` = sqrt(mean (x - y)^2 / 2) is the standard error of a cosine between two pairs. Rows without
    length are left out; with fewer than two rows nothing is known and the result is empty. A direction averages over
    many pairs, but their errors are not independent: they share the projection.
    """
    there_N = (torch.linalg.vector_norm(first_ND, dim=1) > 0) & (torch.linalg.vector_norm(second_ND, dim=1) > 0)
    count = int(there_N.sum())
    if count < 2:
        return {}
    one_NN, two_NN = (_cosines(part[there_N].to(torch.float64)) for part in (first_ND, second_ND))
    above = torch.triu_indices(count, count, 1)
    difference_M = (one_NN - two_NN)[above[0], above[1]]
    error = float((difference_M.square().mean() / 2).sqrt())
    return {"sketch_cosine_error": error, "sketch_cosine_error_pairs": float(count)}


def first_training_row(ctx: Context) -> int:
    """Row of the pairs table that holds the first training pair; -1 if there is none."""
    rows = ctx.scan("pairs").select((pl.col("split") == "train").arg_true().first()).collect()
    found = rows.item() if rows.height else None
    return -1 if found is None else int(found)


def _cosines(rows_ND: Tensor) -> Tensor:
    unit_ND = rows_ND / torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True)
    return unit_ND @ unit_ND.T
