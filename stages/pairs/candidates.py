"""Candidates, and which of them may not be paired."""

from __future__ import annotations

from hashlib import blake2b

import polars as pl

from schemas.config.curation import PairsConfig
from schemas.languages import UNKNOWN
from stages.contract import Context, Drop
from stages.text.codes import same_language
from stages.text.language import unidentifiable
from stages.text.messages import BadRow, comparable, is_blank
from stages.text.refusals import refusal
from stages.text.repetition import repetition
from stages.text.thoughts import Policy, Thoughts

_COLUMNS = [
    "candidate_id",
    "prompt_id",
    "index",
    "n_tokens",
    "finish_reason",
    "language",
    "detected_language",
    "language_confidence",
]


def load_candidates(ctx: Context, thoughts: Thoughts, judged: pl.DataFrame) -> pl.DataFrame:
    """A row a candidate, in table order, without its text. judged: the candidate_id of those that have a score.

    row: position in the table. key: digest of what is learnt of the text (text.thoughts), as it is compared (null: empty).
    refused: why nothing of it can be learnt (null: it can). reason, detail: why it may not be paired (null: it may).
    """
    frames = []
    for path in ctx.inputs["candidates"]:
        frame = pl.read_parquet(path, columns=[*_COLUMNS, "text"], glob=False)
        learnt = [_key(text, thoughts, ctx.config.text.thoughts) for text in frame["text"]]
        keys = pl.Series("key", [key for key, _ in learnt], dtype=pl.Binary)
        refused = pl.Series("refused", [reason for _, reason in learnt], dtype=pl.String)
        repeated = pl.Series(
            "repetition", [_repetition(text, ctx.config.pairs) for text in frame["text"]], dtype=pl.Float64
        )
        refuses = pl.Series("refuses", _refusals(ctx, thoughts, frame), dtype=pl.String)
        frames.append(frame.drop("text").with_columns(keys, refused, repeated, refuses))
    light = pl.concat(frames).with_row_index("row")
    light = light.with_columns(judged=pl.col("candidate_id").is_in(judged["candidate_id"].implode()))
    return light.join(_wrong_languages(light), on=["language", "detected_language"], how="left").pipe(
        _with_reasons, ctx
    )


def candidate_drops(light: pl.DataFrame) -> list[Drop]:
    """The candidates that may not be paired."""
    return [
        Drop("candidate", row["candidate_id"], row["language"], row["reason"], row["detail"])
        for row in light.filter(pl.col("reason").is_not_null()).iter_rows(named=True)
    ]


def collapse(usable: pl.DataFrame, judges: int) -> pl.DataFrame:
    """Candidates of a prompt with the same text as one: the first of them, with their mean scores."""
    return (
        usable.sort("prompt_id", "index", "row")
        .group_by("prompt_id", "key", maintain_order=True)
        .agg(
            pl.col("score").mean(),
            pl.concat_list(pl.col("by_judge").list.get(n).mean() for n in range(judges)).first().alias("by_judge"),
            pl.col("candidate_id", "index", "n_tokens", "row").first(),
        )
    )


def _key(text: str, thoughts: Thoughts, policy: Policy) -> tuple[bytes | None, str | None]:
    """(digest of what is learnt of a text, why nothing is)"""
    try:
        target = thoughts.target(text, policy)
    except BadRow as bad:
        return None, bad.reason if bad.reason != "empty" else None
    return (None if is_blank(target) else blake2b(comparable(target).encode(), digest_size=16).digest()), None


def _repetition(text: str, config: PairsConfig) -> float:
    """Not looked at where nothing leaves by it."""
    return repetition(text) if config.max_repetition < 1 else 0.0


def _refusals(ctx: Context, thoughts: Thoughts, frame: pl.DataFrame) -> list[str]:
    """What each candidate refuses with; not looked at where nothing leaves by it."""
    if not ctx.config.pairs.drop_refusals:
        return [""] * frame.height
    return [refusal(thoughts.said(text), language) for text, language in frame.select("text", "language").iter_rows()]


def _wrong_languages(light: pl.DataFrame) -> pl.DataFrame:
    """Which (language, detected_language) are different languages, as far as the identifier can tell."""
    unknown = set(unidentifiable(light["language"].unique().to_list()))
    combinations = light.select("language", "detected_language").unique()
    wrong = [
        language not in unknown and detected != UNKNOWN and not same_language(detected, language)
        for language, detected in combinations.iter_rows()
    ]
    return combinations.with_columns(wrong=pl.Series(wrong, dtype=pl.Boolean))


def _with_reasons(light: pl.DataFrame, ctx: Context) -> pl.DataFrame:
    config = ctx.config
    truncated = pl.lit(config.pairs.drop_truncated) & (pl.col("finish_reason") == "length")
    repetitive = pl.col("repetition") > config.pairs.max_repetition
    sure = pl.col("language_confidence") >= config.languages.min_confidence
    reason = (
        pl.when(truncated)
        .then(pl.lit("truncated"))
        .when(pl.col("refused").is_not_null())
        .then(pl.col("refused"))
        .when(pl.col("key").is_null())
        .then(pl.lit("empty"))
        .when(repetitive)
        .then(pl.lit("repetitive"))
        .when(pl.col("refuses") != "")
        .then(pl.lit("refusal"))
        .when(pl.col("wrong") & sure)
        .then(pl.lit("wrong_language"))
        .when(~pl.col("judged"))
        .then(pl.lit("unjudged"))
    )
    detail = (
        pl.when(truncated)
        .then(pl.format("{} tokens", "n_tokens"))
        .when(repetitive)
        .then(pl.format("{} > {}", pl.col("repetition").round(3), pl.lit(config.pairs.max_repetition)))
        .when(pl.col("refuses") != "")
        .then("refuses")
        .when(pl.col("wrong") & sure)
        .then(pl.format("{} {}", "detected_language", pl.col("language_confidence").round(2)))
        .otherwise(pl.lit(""))
    )
    return light.sort("row").with_columns(reason=reason, detail=detail)
