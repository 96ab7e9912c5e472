"""The Arrow schemas of gradients: sketches, or sums and inner products where sketches are too large to keep."""

from __future__ import annotations

import pyarrow as pa

from schemas.columns import LANGUAGE, PAIR_ID, SPLIT, Table, column
from schemas.sketches import sketch_type

_RELEVANCE = [
    column(
        "relevance_chosen",
        pa.float32(),
        "mean-token log pi(chosen | prompt) - log pi(chosen | a prompt that says nothing); null: not measured",
        nullable=True,
    ),
    column("relevance_rejected", pa.float32(), "the same of rejected", nullable=True),
    column(
        "null_chosen",
        pa.float32(),
        "the same of chosen under another prompt of the language; null: not in the sample (gradients.relevance_null)",
        nullable=True,
    ),
    column("null_rejected", pa.float32(), "the same of rejected", nullable=True),
]

GRADIENT_TABLES = (
    Table(
        "preconditioner",
        "a factor that multiplies one side of a layer's gradient; only with `sketch.precondition`",
        pa.schema(
            [
                column("layer", pa.string(), "name of the layer"),
                column("side", pa.string(), "out | in"),
                column("factor", pa.list_(pa.float32()), "(row or column mean of the second moments)^(-1/4)"),
            ]
        ),
    ),
    Table(
        "sums",
        "the weighted sum of a part's gradients in one language and layer; only with `sketch.method: one_sided`",
        pa.schema(
            [
                column("part", pa.int32(), "shard of the first pass"),
                LANGUAGE,
                column("layer", pa.string(), "name of the layer"),
                column(
                    "key",
                    pa.string(),
                    "hash of layers, projections, preconditioner, model and conflict.direction: equal or refused",
                ),
                column("n_pairs", pa.int64(), "pairs of the language in the part"),
                column("n_batches", pa.int64(), "their minibatches; 1 unless conflict.direction is ema"),
                column("values", pa.list_(pa.float32()), "sum of omega g, row-major"),
            ]
        ),
    ),
    Table(
        "contributions",
        "a pair's part in its language's sum; only with `sketch.method: one_sided`",
        pa.schema(
            [
                PAIR_ID,
                LANGUAGE,
                column("part", pa.int32(), "shard of the first pass"),
                column("omega", pa.float64(), "weight in the part's sum, before all parts are joined"),
                column("weight", pa.float64(), "c of loss.type, or 1 (conflict.weighting: none)"),
                column("norm", pa.float64(), "norm of the one-sided sketch"),
                column("ref_logp_chosen", pa.float32(), "sum log pi(chosen | prompt) under the reference"),
                column("ref_logp_rejected", pa.float32(), "the same of rejected"),
                *_RELEVANCE,
                column("relevant", pa.bool_(), "false: no answer to its prompt (conflict.relevance), so in no sum"),
            ]
        ),
    ),
)


def gradients_schema(dim: int, both_sides: bool = False) -> pa.Schema:
    """Schema of the gradients table for sketches of `dim` numbers; both_sides: with those of chosen and rejected."""
    sketch = sketch_type(dim)
    columns = [
        column("sketch", sketch, "grad s(chosen) - grad s(rejected), unit norm x 64, as `dim` float16, little-endian"),
        column("norm", pa.float32(), "norm of the sketch before scaling"),
    ]
    for side in ("chosen", "rejected") if both_sides else ():
        columns.append(
            column(f"sketch_{side}", sketch, f"only with sketch.both_sides: grad s({side}), in the same way")
        )
        columns.append(column(f"norm_{side}", pa.float32(), "only with sketch.both_sides: its norm before scaling"))
    return _gradients(columns)


def products_schema(groups: int, languages: int) -> pa.Schema:
    """Schema of the gradients table when the gradients are never stored (`sketch.method: one_sided`)."""
    return _gradients(
        [
            column(
                "products", pa.list_(pa.float64(), max(1, groups * languages)), "<g, G_k>: layer groups x languages"
            ),
            column("squares", pa.list_(pa.float64(), groups), "|g|^2 in each layer group"),
            column("norm", pa.float32(), "norm of the one-sided sketch"),
        ]
    )


def _gradients(vectors: list[pa.Field]) -> pa.Schema:
    return pa.schema(
        [
            PAIR_ID,
            column("group_id", pa.string(), "translation group"),
            LANGUAGE,
            SPLIT,
            *vectors,
            column("logp_chosen", pa.float32(), "sum log pi(chosen | prompt)"),
            column("logp_rejected", pa.float32(), "sum log pi(rejected | prompt)"),
            column("ref_logp_chosen", pa.float32(), "the same under the reference"),
            column("ref_logp_rejected", pa.float32(), "the same under the reference"),
            column("n_prompt", pa.int32(), "prompt tokens"),
            column("n_chosen", pa.int32(), "completion tokens, end of turn included"),
            column("n_rejected", pa.int32(), "completion tokens, end of turn included"),
            column("ids_hash", pa.string(), "hash of the token ids: training verifies it"),
            *_RELEVANCE,
        ]
    )
