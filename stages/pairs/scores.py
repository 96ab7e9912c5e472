"""Judgements to one score for each candidate and criterion: votes averaged, a panel's judges standardised and combined."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from schemas.config.judging import Judge, JudgeConfig
from stages.contract import Context

_KEYS = ["candidate_id", "prompt_id", "language"]


def criterion_scores(ctx: Context) -> dict[str, pl.DataFrame]:
    """criterion -> candidate_id, score, by_judge (the scores of its judges in the order of the config).

    A lone judge's score is the mean over the votes that could be read, on its own scale. Of a panel it is the mean of the judges'
    standardised scores: less the mean and over the standard deviation of what that judge gave in that language. A candidate
    that not every judge of the panel scored has none.
    """
    means = (
        _votes(ctx)
        .group_by("criterion", "judge", *_KEYS, maintain_order=True)
        .agg(pl.col("score").drop_nans().mean())
        .filter(pl.col("score").is_not_null())
        .collect()
    )
    return {criterion: _combined(means, judges) for criterion, judges in _by_criterion(ctx.config.judge).items()}


def agreements(ctx: Context) -> Iterator[tuple[str, str, str, float, int]]:
    """(criterion, judge, other judge, share, n) of every two judges of a panel: of two answers to a prompt that both judges tell
    apart, how often they prefer the same one."""
    for criterion, judges in _by_criterion(ctx.config.judge).items():
        if len(judges) < 2:
            continue
        scores = criterion_scores_of_panel(ctx, judges)
        for a in range(len(judges)):
            for b in range(a + 1, len(judges)):
                yield criterion, judges[a].name, judges[b].name, *_agreement(scores, a, b)


def criterion_scores_of_panel(ctx: Context, judges: list[Judge]) -> pl.DataFrame:
    """candidate_id, prompt_id and the mean votes `0`, `1`, … of the judges of one criterion."""
    votes = _votes(ctx).filter(pl.col("criterion") == judges[0].criterion)
    means = votes.group_by("judge", *_KEYS, maintain_order=True).agg(pl.col("score").drop_nans().mean()).collect()
    return _side_by_side(means, judges)


def _votes(ctx: Context) -> pl.LazyFrame:
    return ctx.scan("judgements").with_columns(pl.col("criterion", "judge").fill_null(""))


def _agreement(scores: pl.DataFrame, a: int, b: int) -> tuple[float, int]:
    one, other = str(a), str(b)
    both = scores.lazy().select("candidate_id", "prompt_id", x=pl.col(one), y=pl.col(other)).drop_nulls()
    pairs = (
        both.join(both, on="prompt_id", suffix="_")
        .filter(pl.col("candidate_id") < pl.col("candidate_id_"))
        .select(first=(pl.col("x") - pl.col("x_")).sign(), second=(pl.col("y") - pl.col("y_")).sign())
        .filter((pl.col("first") != 0) & (pl.col("second") != 0))
        .select(same=(pl.col("first") == pl.col("second")).mean(), n=pl.len())
        .collect()
    )
    share, n = pairs.row(0)
    return (float("nan") if share is None else float(share)), int(n)


def _by_criterion(config: JudgeConfig) -> dict[str, list[Judge]]:
    found: dict[str, list[Judge]] = {}
    for judge in config.judges:
        found.setdefault(judge.criterion, []).append(judge)
    return found


def _combined(means: pl.DataFrame, judges: list[Judge]) -> pl.DataFrame:
    mine = means.filter(criterion=judges[0].criterion)
    if len(judges) == 1:
        mine = mine.filter(judge=judges[0].name)
        return mine.select("candidate_id", "score", by_judge=pl.concat_list("score"))
    spread = pl.col("score").std(ddof=0).over("judge", "language")
    centred = pl.col("score") - pl.col("score").mean().over("judge", "language")
    standardised = mine.with_columns(score=pl.when(spread > 0).then(centred / spread).otherwise(0.0))
    wide = _side_by_side(standardised, judges)
    columns = [str(number) for number in range(len(judges))]
    return wide.drop_nulls(columns).select(
        "candidate_id", score=pl.mean_horizontal(columns), by_judge=pl.concat_list(columns)
    )


def _side_by_side(means: pl.DataFrame, judges: list[Judge]) -> pl.DataFrame:
    wide = means.select(_KEYS).unique(maintain_order=True)
    for number, judge in enumerate(judges):
        one = means.filter(judge=judge.name).select("candidate_id", pl.col("score").alias(str(number)))
        wide = wide.join(one, on="candidate_id", how="left", maintain_order="left")
    return wide
