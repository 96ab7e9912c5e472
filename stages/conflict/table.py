"""The scores table from what `scoring.py` found: column by column, without a Python object per pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
from torch import Tensor

from schemas.reasons import OFF_TOPIC
from schemas.tables import COSINES, TABLES
from stages.conflict.scores import FLAGS, PairScores

_ROWS = 65_536
_COSINES = 2**21
"""Of a batch of rows, at most: many languages get shorter batches."""


def score_rows(
    pairs: pl.DataFrame, languages: Sequence[str], scores: PairScores, weight_N: Tensor, others: bool = False
) -> Iterator[pa.Table]:
    """The scores table in batches of rows.

    pairs: pair_id, language, norm, relevance of both sides, logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected, n_chosen,
    n_rejected, in the order of `scores`. weight_N: c_i. others: `score` is score_others, else score_all (`PairScores.used`).
    """
    scalars = _scalars(pairs)
    score_N, scored_N = scores.used(others)
    schema = TABLES["scores"].schema
    step = max(1, min(_ROWS, _COSINES // len(languages)))
    for start in range(0, pairs.height, step):
        rows = slice(start, min(start + step, pairs.height))
        table = scalars[rows].to_arrow()
        values = {name: table[name] for name in table.column_names}
        for name in ("score_all", "score_others", "score_mean", "cosine_own"):
            values[name] = _optional(getattr(scores, name)[rows], getattr(scores, f"{name}_valid")[rows])
        values["score"] = _optional(score_N[rows], scored_N[rows])
        cosine_NL = scores.cosines(rows.start, rows.stop).numpy()
        valid_NL = ~np.isnan(cosine_NL)
        names = pa.array(languages, pa.string()).take(pa.array(valid_NL.nonzero()[1]))
        flat = pa.array(cosine_NL[valid_NL])
        entries = pa.StructArray.from_arrays([names, flat], fields=list(COSINES.value_type))
        values["cosines"] = pa.ListArray.from_arrays(_offsets(valid_NL), entries)
        values["conflicting_languages"] = _labels(valid_NL & (cosine_NL < 0), languages)
        values["weight"] = pa.array(weight_N[rows].numpy())
        values["gradient_norm"] = pa.array(scores.norm[rows].numpy())
        values["flags"] = _labels(np.stack([scores.flags[name][rows].numpy() for name in FLAGS], axis=1), FLAGS)
        yield pa.table([_cast(values[field.name], field.type) for field in schema], schema=schema)


def held_rows(pairs: pl.DataFrame) -> pa.Table:
    """The scores table of pairs that the relevance gate holds back: no score, no weight."""
    schema = TABLES["scores"].schema
    frame = _scalars(pairs).with_columns(weight=pl.lit(0.0), flags=pl.lit([OFF_TOPIC]))
    table, n = frame.to_arrow(), pairs.height
    columns = [
        _cast(table[field.name], field.type) if field.name in table.column_names else _nothing(field, n)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _nothing(field: pa.Field, n: int) -> pa.Array:
    """Empty lists, or nulls."""
    if not pa.types.is_list(field.type):
        return pa.nulls(n, field.type)
    return pa.ListArray.from_arrays(pa.array([0] * (n + 1), pa.int32()), pa.nulls(0, field.type.value_type))


def _scalars(pairs: pl.DataFrame) -> pl.DataFrame:
    """What the scores table says of a pair whatever it is compared with."""
    return pairs.select(
        "pair_id",
        "language",
        pl.col("norm").cast(pl.Float32),
        "relevance_chosen",
        "relevance_rejected",
        implicit_margin=margin(),
        logp_margin=pl.col("logp_chosen").cast(pl.Float64) / pl.col("n_chosen")
        - pl.col("logp_rejected").cast(pl.Float64) / pl.col("n_rejected"),
        n_tokens=pl.col("n_chosen").cast(pl.Int64) + pl.col("n_rejected").cast(pl.Int64),
    )


def margin() -> pl.Expr:
    """Delta, the implicit reward of chosen minus rejected over beta, from the gradients table's columns; float64."""
    chosen, rejected = log_ratios()
    return chosen - rejected


def log_ratios(reference_free: bool = False) -> tuple[pl.Expr, pl.Expr]:
    """s - s_ref of chosen and of rejected, or s, from the gradients table's columns; float64."""
    chosen, rejected = (pl.col(f"logp_{side}").cast(pl.Float64) for side in ("chosen", "rejected"))
    if reference_free:
        return chosen, rejected
    return chosen - pl.col("ref_logp_chosen").cast(pl.Float64), rejected - pl.col("ref_logp_rejected").cast(pl.Float64)


def _optional(value_N: Tensor, valid_N: Tensor) -> pa.Array:
    return pa.array(value_N.numpy(), mask=~valid_N.numpy())


def _labels(on_NK: np.ndarray, names: Sequence[str]) -> pa.Array:
    """For every row the names of the columns that are on."""
    return pa.ListArray.from_arrays(_offsets(on_NK), pa.array(names, pa.string()).take(pa.array(on_NK.nonzero()[1])))


def _offsets(on_NK: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], on_NK.sum(axis=1).cumsum()]).astype(np.int32))


def _cast(values: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return values if values.type == kind else values.cast(kind)
