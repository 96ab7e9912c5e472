"""The Arrow schema of every table. Each column carries its meaning; docs/tables.md is made from here."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))
COSINES = pa.list_(pa.struct([pa.field("language", pa.string()), pa.field("cosine", pa.float32())]))


@dataclass(frozen=True)
class Table:
    """A named table: what a row is, and its Arrow schema (column meanings in the field metadata)."""

    name: str
    row: str
    schema: pa.Schema


def _column(name: str, type_: pa.DataType, meaning: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, type_, nullable=nullable, metadata={"meaning": meaning})


_PROMPT_ID = _column("prompt_id", pa.string(), "content hash of language and messages")
_GROUP = _column("group_id", pa.string(), "translation group: the same task in every language")
_LANGUAGE = _column("language", pa.string(), "language of the prompt, BCP 47")
_SPLIT = _column("split", pa.string(), "train | dev | test | unseen")
_PAIR_ID = _column("pair_id", pa.string(), "content hash of prompt, chosen and rejected")
_ROUND = _column("round", pa.int32(), "self-rewarding round that made the row, from 0")
_PAIR_BODY = [
    _column("prompt", MESSAGES, "messages ending in a user turn"),
    _column("chosen", MESSAGES, "the preferred answer, one assistant message"),
    _column("rejected", MESSAGES, "the other answer, one assistant message"),
]
_CURATED = [
    _PAIR_ID,
    _column("prompt_id", pa.string(), "prompt of the pair"),
    _GROUP,
    _LANGUAGE,
    *_PAIR_BODY,
    _column("chosen_score", pa.float64(), "judge score of chosen", nullable=True),
    _column("rejected_score", pa.float64(), "judge score of rejected", nullable=True),
    _column("conflict_score", pa.float64(), "score the selection used", nullable=True),
]

_METRICS = [
    _column("step", pa.int64(), "optimizer step"),
    _column(
        "name",
        pa.string(),
        "name as TRL logs it, or ours: merge/, mask/, objective/NAME/, allo/PHASE/ (docs/methods.md, sections 5 to 8)",
    ),
    _column("value", pa.float64(), "value"),
]

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "prompts",
            "a prompt",
            pa.schema(
                [
                    _PROMPT_ID,
                    _GROUP,
                    _LANGUAGE,
                    _SPLIT,
                    _column("messages", MESSAGES, "conversation ending in a user turn"),
                    _column("language_confidence", pa.float32(), "identifier's probability, 0 to 1"),
                    _column("source", pa.string(), "file or dataset the row came from"),
                    _column("source_row", pa.int64(), "row number in the source, from 0"),
                ]
            ),
        ),
        Table(
            "candidates",
            "a generated answer",
            pa.schema(
                [
                    _column("candidate_id", pa.string(), "hash of prompt_id, round, index, text"),
                    _column("prompt_id", pa.string(), "prompt it answers"),
                    _ROUND,
                    _column("index", pa.int32(), "0 .. candidates-1"),
                    _column("text", pa.string(), "the answer, special tokens neutralised"),
                    _column("n_tokens", pa.int32(), "tokens generated, end of turn included"),
                    _column("finish_reason", pa.string(), "stop | length"),
                    _LANGUAGE,
                    _column("detected_language", pa.string(), "language of the answer, und if unknown"),
                    _column("language_confidence", pa.float32(), "identifier's probability, 0 to 1"),
                ]
            ),
        ),
        Table(
            "judgements",
            "one vote on a candidate",
            pa.schema(
                [
                    _column("candidate_id", pa.string(), "candidate judged"),
                    _column("prompt_id", pa.string(), "prompt it answers"),
                    _LANGUAGE,
                    _column("method", pa.string(), "expected_score | additive"),
                    _column("judge_model", pa.string(), "name of the judge"),
                    _column("vote", pa.int32(), "0 .. votes-1"),
                    _column("score", pa.float64(), "0 to 5; null if the vote could not be parsed", True),
                    _column("mass", pa.float64(), "probability on score tokens; null for additive", True),
                ]
            ),
        ),
        Table(
            "pairs",
            "a preference pair",
            pa.schema(
                [
                    _PAIR_ID,
                    _ROUND,
                    _column("prompt_id", pa.string(), "prompt of the pair"),
                    _GROUP,
                    _LANGUAGE,
                    _SPLIT,
                    *_PAIR_BODY,
                    _column("chosen_score", pa.float64(), "mean judge score", True),
                    _column("rejected_score", pa.float64(), "mean judge score", True),
                    _column("chosen_candidate_id", pa.string(), "null for imported pairs", True),
                    _column("rejected_candidate_id", pa.string(), "null for imported pairs", True),
                    _column("source", pa.string(), "self-rewarding, or the imported dataset"),
                ]
            ),
        ),
        Table(
            "scores",
            "the conflict score of a training pair",
            pa.schema(
                [
                    _PAIR_ID,
                    _LANGUAGE,
                    _column("score", pa.float64(), "the score select uses; null: no gradient", True),
                    _column("score_all", pa.float64(), "cosine with the merged direction, pair left out", True),
                    _column("score_others", pa.float64(), "cosine with the other languages' direction", True),
                    _column("score_mean", pa.float64(), "cosine with the mean of all directions, no surgery", True),
                    _column("cosine_own", pa.float64(), "cosine with its own language, pair left out", True),
                    _column("cosines", COSINES, "cosine with every language's direction, pair left out"),
                    _column("conflicting_languages", pa.list_(pa.string()), "languages with cosine < 0"),
                    _column("norm", pa.float32(), "norm of the sketched gradient difference"),
                    _column(
                        "weight",
                        pa.float64(),
                        "c of loss.type that weighted the gradient; two-sided losses: the mean absolute weight of the sides",
                    ),
                    _column(
                        "implicit_margin", pa.float64(), "log pi/pi_ref of chosen minus rejected, summed over tokens"
                    ),
                    _column("logp_margin", pa.float64(), "mean-token log pi of chosen minus rejected"),
                    _column("n_tokens", pa.int64(), "completion tokens of both answers"),
                    _column(
                        "flags",
                        pa.list_(pa.string()),
                        "few_pairs | single_language | zero_gradient | no_own_direction | no_direction",
                    ),
                ]
            ),
        ),
        Table(
            "gram",
            "an inner product between two languages' directions",
            pa.schema(
                [
                    _column("scope", pa.string(), "model, or the layer group"),
                    _column("language", pa.string(), "row"),
                    _column("other", pa.string(), "column"),
                    _column("dot", pa.float64(), "<G_l, G_k>"),
                    _column("cosine", pa.float64(), "dot over the norms; null if one is zero", True),
                    _column(
                        "null_negative_rate",
                        pa.float64(),
                        "share of negative cosines between random halves of one language (mean of the two): what noise alone does",
                        True,
                    ),
                ]
            ),
        ),
        Table(
            "directions",
            "the aggregated gradient direction of a language",
            pa.schema(
                [
                    _column("scope", pa.string(), "model, or the layer group"),
                    _column("language", pa.string(), "language"),
                    _column("n_pairs", pa.int64(), "pairs in the direction"),
                    _column("norm", pa.float64(), "norm of the direction"),
                    _column("weight", pa.float64(), "weight after gradient surgery"),
                    _column("conflicts", pa.int64(), "languages with a negative inner product"),
                    _column("direction", pa.list_(pa.float32()), "the direction in sketch space"),
                ]
            ),
        ),
        Table(
            "preconditioner",
            "a factor that multiplies one side of a layer's gradient; only with `sketch.precondition`",
            pa.schema(
                [
                    _column("layer", pa.string(), "name of the layer"),
                    _column("side", pa.string(), "out | in"),
                    _column("factor", pa.list_(pa.float32()), "(row or column mean of the second moments)^(-1/4)"),
                ]
            ),
        ),
        Table(
            "sums",
            "the weighted sum of a part's gradients in one language and layer; only with `sketch.method: one_sided`",
            pa.schema(
                [
                    _column("part", pa.int32(), "shard of the first pass"),
                    _LANGUAGE,
                    _column("layer", pa.string(), "name of the layer"),
                    _column(
                        "key",
                        pa.string(),
                        "hash of layers, projections, preconditioner, model and conflict.direction: equal or refused",
                    ),
                    _column("n_pairs", pa.int64(), "pairs of the language in the part"),
                    _column("n_batches", pa.int64(), "their minibatches; 1 unless conflict.direction is ema"),
                    _column("values", pa.list_(pa.float32()), "sum of omega g, row-major"),
                ]
            ),
        ),
        Table(
            "contributions",
            "a pair's part in its language's sum; only with `sketch.method: one_sided`",
            pa.schema(
                [
                    _PAIR_ID,
                    _LANGUAGE,
                    _column("part", pa.int32(), "shard of the first pass"),
                    _column("omega", pa.float64(), "weight in the part's sum, before all parts are joined"),
                    _column("weight", pa.float64(), "c of loss.type, or 1 (conflict.weighting: none)"),
                    _column("norm", pa.float64(), "norm of the one-sided sketch"),
                    _column("ref_logp_chosen", pa.float32(), "sum log pi(chosen | prompt) under the reference"),
                    _column("ref_logp_rejected", pa.float32(), "the same of rejected"),
                ]
            ),
        ),
        Table("curated", "a pair that was kept", pa.schema(_CURATED)),
        Table(
            "rejected",
            "a pair that was not kept",
            pa.schema([*_CURATED, _column("reason", pa.string(), "why it was not kept")]),
        ),
        Table(
            "metrics",
            "a logged training value",
            pa.schema(_METRICS),
        ),
        Table(
            "conversations",
            "a conversation the sft stage learnt from; only with `sft.sources`",
            pa.schema(
                [
                    _column("conversation_id", pa.string(), "content hash of language and messages"),
                    _column("language", pa.string(), "BCP 47 code that the data gives, und if none"),
                    _column("messages", MESSAGES, "conversation ending in an answer, special tokens neutralised"),
                    _column("n_tokens", pa.int32(), "tokens of the rendered conversation"),
                    _column("n_learnt", pa.int32(), "of these, tokens of answers that the loss is over"),
                    _column("source", pa.string(), "file or dataset the row came from"),
                    _column("source_row", pa.int64(), "row number in the source, from 0"),
                ]
            ),
        ),
        Table("sft_metrics", "a logged value of the sft stage", pa.schema(_METRICS)),
        Table(
            "answers",
            "a held-out answer, before or after training",
            pa.schema(
                [
                    _column("model", pa.string(), "before | after"),
                    _column("prompt_id", pa.string(), "held-out prompt"),
                    _LANGUAGE,
                    _SPLIT,
                    _column("messages", MESSAGES, "the prompt"),
                    _column("text", pa.string(), "the answer"),
                    _column("finish_reason", pa.string(), "stop | length"),
                    _column("detected_language", pa.string(), "language of the answer"),
                ]
            ),
        ),
        Table(
            "evaluation",
            "a measured value",
            pa.schema(
                [
                    _column("model", pa.string(), "before | after | after vs before"),
                    _column("split", pa.string(), "dev | test | unseen | authored"),
                    _column("language", pa.string(), "language, or all"),
                    _column("metric", pa.string(), "see docs/methods.md"),
                    _column("value", pa.float64(), "value; null if n is 0", True),
                    _column("n", pa.int64(), "items it was measured on"),
                    _column("low", pa.float64(), "lower end of the 95% interval", True),
                    _column("high", pa.float64(), "upper end of the 95% interval", True),
                ]
            ),
        ),
        Table(
            "dropped",
            "an input row that was not kept (in _dropped/<table>/)",
            pa.schema(
                [
                    _column("unit", pa.string(), "what was dropped: prompt | candidate | pair | comparison | row"),
                    _column("row_id", pa.string(), "its id, or source:row"),
                    _column("language", pa.string(), "its language, und if unknown"),
                    _column("reason", pa.string(), "reason code"),
                    _column("detail", pa.string(), "the figures behind the reason"),
                    _column("failed", pa.bool_(), "true: an error; false: a rule"),
                ]
            ),
        ),
    )
}


def gradients_schema(dim: int, both_sides: bool = False) -> pa.Schema:
    """Schema of the gradients table for sketches of `dim` numbers; both_sides: with those of chosen and rejected."""
    sketch = pa.list_(pa.float16(), dim)
    columns = [
        _column("sketch", sketch, "grad s(chosen) - grad s(rejected), unit norm x 64"),
        _column("norm", pa.float32(), "norm of the sketch before scaling"),
    ]
    for side in ("chosen", "rejected") if both_sides else ():
        columns.append(
            _column(f"sketch_{side}", sketch, f"only with sketch.both_sides: grad s({side}), unit norm x 64")
        )
        columns.append(_column(f"norm_{side}", pa.float32(), "only with sketch.both_sides: its norm before scaling"))
    return _gradients(columns)


def products_schema(groups: int, languages: int) -> pa.Schema:
    """Schema of the gradients table when the gradients are never stored (`sketch.method: one_sided`)."""
    return _gradients(
        [
            _column(
                "products", pa.list_(pa.float64(), max(1, groups * languages)), "<g, G_k>: layer groups x languages"
            ),
            _column("squares", pa.list_(pa.float64(), groups), "|g|^2 in each layer group"),
            _column("norm", pa.float32(), "norm of the one-sided sketch"),
        ]
    )


def _gradients(vectors: list[pa.Field]) -> pa.Schema:
    return pa.schema(
        [
            _PAIR_ID,
            _column("group_id", pa.string(), "translation group"),
            _LANGUAGE,
            *vectors,
            _column("logp_chosen", pa.float32(), "sum log pi(chosen | prompt)"),
            _column("logp_rejected", pa.float32(), "sum log pi(rejected | prompt)"),
            _column("ref_logp_chosen", pa.float32(), "the same under the reference"),
            _column("ref_logp_rejected", pa.float32(), "the same under the reference"),
            _column("n_prompt", pa.int32(), "prompt tokens"),
            _column("n_chosen", pa.int32(), "completion tokens, end of turn included"),
            _column("n_rejected", pa.int32(), "completion tokens, end of turn included"),
            _column("ids_hash", pa.string(), "hash of the token ids: training verifies it"),
        ]
    )


def schema_of(name: str) -> pa.Schema | None:
    """The fixed schema of a table; None for gradients, whose width follows the config."""
    return None if name == "gradients" else TABLES[name].schema
