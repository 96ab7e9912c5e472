"""The Arrow schema of every table. Each column carries its meaning; docs/tables.md is made from here."""

from __future__ import annotations

import pyarrow as pa

from schemas.columns import (
    COSINES,
    CRITERION,
    GROUP,
    LANGUAGE,
    MESSAGES,
    PAIR_BODY,
    PAIR_ID,
    PROMPT_ID,
    ROUND,
    SPLIT,
    Table,
    column,
)
from schemas.gradient_tables import GRADIENT_TABLES, gradients_schema, products_schema

__all__ = ["COSINES", "FEW_PAIRS", "MESSAGES", "TABLES", "Table", "gradients_schema", "products_schema", "schema_of"]

FEW_PAIRS = 20
"""A language with fewer is flagged: its direction is mostly noise."""

_CURATED = [
    PAIR_ID,
    column("prompt_id", pa.string(), "prompt of the pair"),
    GROUP,
    LANGUAGE,
    *PAIR_BODY,
    CRITERION,
    column("chosen_score", pa.float64(), "judge score of chosen", nullable=True),
    column("rejected_score", pa.float64(), "judge score of rejected", nullable=True),
    column("conflict_score", pa.float64(), "score the selection used", nullable=True),
]

_METRICS = [
    column("step", pa.int64(), "optimizer step"),
    column(
        "name",
        pa.string(),
        "name as TRL logs it, or ours: merge/, mask/, surgery/, objective/NAME/, allo/PHASE/ (docs/methods.md, sections 5 to 8)",
    ),
    column("value", pa.float64(), "value"),
]

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "prompts",
            "a prompt",
            pa.schema(
                [
                    PROMPT_ID,
                    GROUP,
                    LANGUAGE,
                    SPLIT,
                    column("messages", MESSAGES, "conversation ending in a user turn"),
                    column("language_confidence", pa.float32(), "identifier's probability, 0 to 1"),
                    column("source", pa.string(), "file or dataset the row came from"),
                    column("source_row", pa.int64(), "row number in the source, from 1"),
                ]
            ),
        ),
        Table(
            "candidates",
            "a generated answer",
            pa.schema(
                [
                    column("candidate_id", pa.string(), "hash of prompt_id, round, index, text"),
                    column("prompt_id", pa.string(), "prompt it answers"),
                    ROUND,
                    column("index", pa.int32(), "0 .. candidates-1"),
                    column("text", pa.string(), "the answer, special tokens neutralised"),
                    column("n_tokens", pa.int32(), "tokens generated, end of turn included"),
                    column("finish_reason", pa.string(), "stop | length"),
                    LANGUAGE,
                    column("detected_language", pa.string(), "language of the answer, und if unknown"),
                    column("language_confidence", pa.float32(), "identifier's probability, 0 to 1"),
                ]
            ),
        ),
        Table(
            "judgements",
            "one vote on a candidate",
            pa.schema(
                [
                    column("candidate_id", pa.string(), "candidate judged"),
                    column("prompt_id", pa.string(), "prompt it answers"),
                    LANGUAGE,
                    column("method", pa.string(), "judge.method"),
                    column("judge_model", pa.string(), "name of the judge"),
                    column("vote", pa.int32(), "0 .. votes-1"),
                    column("score", pa.float64(), "on the method's scale (docs/judges.md); null if not parsed", True),
                    column(
                        "mass",
                        pa.float64(),
                        "probability on the judge's possible replies; null where it has none",
                        True,
                    ),
                    column(
                        "consistency",
                        pa.float64(),
                        "pairwise: share of its comparisons that come out alike in both orders; null where none was asked",
                        True,
                    ),
                    CRITERION,
                    column("judge", pa.string(), "the judge's name in judge.panel; null without one", True),
                ]
            ),
        ),
        Table(
            "pairs",
            "a preference pair",
            pa.schema(
                [
                    PAIR_ID,
                    ROUND,
                    column("prompt_id", pa.string(), "prompt of the pair"),
                    GROUP,
                    LANGUAGE,
                    SPLIT,
                    *PAIR_BODY,
                    column("chosen_score", pa.float64(), "mean judge score", True),
                    column("rejected_score", pa.float64(), "mean judge score", True),
                    column("chosen_candidate_id", pa.string(), "null for imported pairs", True),
                    column("rejected_candidate_id", pa.string(), "null for imported pairs", True),
                    column("source", pa.string(), "self-rewarding, or the imported dataset"),
                    CRITERION,
                    column(
                        "label_error",
                        pa.string(),
                        "what the imported dataset says is wrong with it, empty: nothing; null: it does not say",
                        True,
                    ),
                ]
            ),
        ),
        Table(
            "scores",
            "the conflict score of a training pair",
            pa.schema(
                [
                    PAIR_ID,
                    LANGUAGE,
                    column(
                        "score",
                        pa.float64(),
                        "the score select uses; null: the pair is off-topic, the gradient is zero, or no other language is left to compare with (flags)",
                        True,
                    ),
                    column("score_all", pa.float64(), "cosine with the merged direction, pair left out", True),
                    column("score_others", pa.float64(), "cosine with the other languages' direction", True),
                    column("score_mean", pa.float64(), "cosine with the mean of all directions, no surgery", True),
                    column("cosine_own", pa.float64(), "cosine with its own language, pair left out", True),
                    column("cosines", COSINES, "cosine with every language's direction, pair left out"),
                    column("conflicting_languages", pa.list_(pa.string()), "languages with cosine < 0"),
                    column("norm", pa.float32(), "norm of the sketched gradient difference"),
                    column(
                        "weight",
                        pa.float64(),
                        "c of loss.type that weighted the gradient; two-sided losses: the mean absolute weight of the sides",
                    ),
                    column(
                        "gradient_norm",
                        pa.float64(),
                        "norm of the weighted gradient in conflict.metric, whose cosine the score is; null: off-topic",
                        True,
                    ),
                    column(
                        "implicit_margin", pa.float64(), "log pi/pi_ref of chosen minus rejected, summed over tokens"
                    ),
                    column("logp_margin", pa.float64(), "mean-token log pi of chosen minus rejected"),
                    column("n_tokens", pa.int64(), "completion tokens of both answers"),
                    column("relevance_chosen", pa.float32(), "as in gradients; null: not measured", True),
                    column("relevance_rejected", pa.float32(), "the same of rejected", True),
                    column(
                        "flags",
                        pa.list_(pa.string()),
                        "off_topic | few_pairs | single_language | zero_gradient | no_own_direction | no_direction | no_other_direction",
                    ),
                ]
            ),
        ),
        Table(
            "gram",
            "an inner product between two languages' directions",
            pa.schema(
                [
                    column("scope", pa.string(), "model, or the layer group"),
                    column("language", pa.string(), "row"),
                    column("other", pa.string(), "column"),
                    column("dot", pa.float64(), "<G_l, G_k>"),
                    column("cosine", pa.float64(), "dot over the norms; null if one is zero", True),
                    column(
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
                    column("scope", pa.string(), "model, or the layer group"),
                    column("language", pa.string(), "language"),
                    column("n_pairs", pa.int64(), "pairs in the direction"),
                    column("norm", pa.float64(), "norm of the direction"),
                    column("weight", pa.float64(), "weight after gradient surgery"),
                    column("conflicts", pa.int64(), "languages with a negative inner product"),
                    column("direction", pa.list_(pa.float32()), "the direction in sketch space"),
                ]
            ),
        ),
        *GRADIENT_TABLES,
        Table("curated", "a pair that was kept", pa.schema(_CURATED)),
        Table(
            "rejected",
            "a pair that was not kept",
            pa.schema([*_CURATED, column("reason", pa.string(), "why it was not kept")]),
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
                    column("conversation_id", pa.string(), "content hash of language and messages"),
                    column("language", pa.string(), "BCP 47 code that the data gives, und if none"),
                    column("messages", MESSAGES, "conversation ending in an answer, special tokens neutralised"),
                    column("n_tokens", pa.int32(), "tokens of the rendered conversation"),
                    column("n_learnt", pa.int32(), "of these, tokens of answers that the loss is over"),
                    column("source", pa.string(), "file or dataset the row came from"),
                    column("source_row", pa.int64(), "row number in the source, from 1"),
                ]
            ),
        ),
        Table("sft_metrics", "a logged value of the sft stage", pa.schema(_METRICS)),
        Table(
            "answers",
            "a held-out answer, before or after training",
            pa.schema(
                [
                    column("model", pa.string(), "before | after | baseline"),
                    column("prompt_id", pa.string(), "held-out prompt"),
                    LANGUAGE,
                    SPLIT,
                    column("messages", MESSAGES, "the prompt"),
                    column("text", pa.string(), "the answer"),
                    column("finish_reason", pa.string(), "stop | length"),
                    column("detected_language", pa.string(), "language of the answer"),
                ]
            ),
        ),
        Table(
            "evaluation",
            "a measured value",
            pa.schema(
                [
                    column("model", pa.string(), "before | after | baseline | after vs before"),
                    column("split", pa.string(), "dev | test | unseen | authored | benchmark"),
                    column("language", pa.string(), "language, or all"),
                    column("metric", pa.string(), "see docs/methods.md"),
                    column("value", pa.float64(), "value; null if n is 0, or where it is not defined", True),
                    column("n", pa.int64(), "items it was measured on"),
                    column("low", pa.float64(), "lower end of the 95% interval", True),
                    column("high", pa.float64(), "upper end of the 95% interval", True),
                ]
            ),
        ),
        Table(
            "dropped",
            "an input row that was not kept (in _dropped/<table>/)",
            pa.schema(
                [
                    column(
                        "unit", pa.string(), "what was dropped: prompt | candidate | pair | comparison | question | row"
                    ),
                    column("row_id", pa.string(), "its id, or source:row"),
                    column("language", pa.string(), "its language, und if unknown"),
                    column("reason", pa.string(), "reason code"),
                    column("detail", pa.string(), "the figures behind the reason"),
                    column("failed", pa.bool_(), "true: an error; false: a rule"),
                    column("text", pa.string(), "rows of sources: how the row's text begins; else empty"),
                ]
            ),
        ),
    )
}


def schema_of(name: str) -> pa.Schema | None:
    """The fixed schema of a table; None for gradients, whose width follows the config."""
    return None if name == "gradients" else TABLES[name].schema
