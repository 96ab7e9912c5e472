"""What pairs can be ranked by: the conflict score, and the filters it has to be compared with.

Every filter is a pure function of one frame of pairs: it gives a number per pair, larger is kept first, null where it
has nothing to go by. They share one rule for the cut (`stages.select.stage.rank`); `stages.compare` puts them side by side on one pool, so
that filters differ in which pairs they keep and never in how many (docs/methods.md section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from schemas.errors import UserError
from schemas.ids import unit_interval


@dataclass(frozen=True)
class Filter:
    """A ranking. columns: what it reads beside pair_id and language; value: from the frame and a seed key to [N]; nothing: (why it ranks no
    pair at all, what to do), where that has a reason of its own; implicit: it means nothing where every implicit reward is zero."""

    columns: tuple[str, ...]
    value: Callable[[pl.DataFrame, Sequence[object]], pl.Series]
    nothing: tuple[str, str] = ("no pair has the value it goes by", "Rank by another one.")
    implicit: bool = False


def ranking(pairs: pl.DataFrame, by: str, seed: Sequence[object] = (0,)) -> pl.Series:
    """What each pair is ranked by, float64 [N], larger is kept first; null where the pair cannot be ranked, never NaN.

    pairs: pair_id, language, the filter's `columns` and, if there are several, criterion, as in the tables pairs and scores. seed: keys of `random`.
    Raises UserError for an unknown filter, a missing column, or one that goes by implicit rewards where every one is zero.
    """
    if by not in FILTERS:
        raise UserError(f"there is no filter {by!r}", where="select.by", fix=f"Known: {', '.join(FILTERS)}.")
    filter_ = FILTERS[by]
    missing = [name for name in ("pair_id", "language", *filter_.columns) if name not in pairs.columns]
    if missing:
        raise UserError(f"filter {by} needs the columns {', '.join(missing)}", where="select.by")
    if filter_.implicit and pairs.height and not (pairs["implicit_margin"].fill_null(0.0) != 0).any():
        raise UserError(
            "the implicit reward of every pair is zero: the policy is the reference",
            where=f"select.by: {by}",
            fix="Name the model that the policy was trained from (model.reference), or set select.by: logp_margin.",
        )
    if "criterion" not in pairs.columns:
        pairs = pairs.with_columns(criterion=pl.lit(None, pl.String))
    return filter_.value(pairs, seed).cast(pl.Float64).fill_nan(None).alias(by)


_TOGETHER = ("language", "criterion")
"""Pairs that are ranked against each other have these in common: judge's scores of two criteria have no common scale."""


def _expression(expression: pl.Expr) -> Callable[[pl.DataFrame, Sequence[object]], pl.Series]:
    return lambda pairs, seed: pairs.select(expression).to_series()


def _random(pairs: pl.DataFrame, seed: Sequence[object]) -> pl.Series:
    keys = [unit_interval(*seed[:1], "select", *seed[1:], pair_id) for pair_id in pairs["pair_id"]]
    return pl.Series(keys, dtype=pl.Float64)


def _middle(value: pl.Expr) -> pl.Expr:
    """Minus the distance to the middle of language and criterion: 0 there, towards -1 at its ends; equal values share a rank."""
    value = value.fill_nan(None)
    # doubled ranks are whole numbers: both sides of the middle tie exactly, and ties go by pair id
    return -((2 * value.rank("average") - value.count() - 1).abs() / value.count()).over(_TOGETHER)


def _both(one: pl.Expr, other: pl.Expr) -> pl.Expr:
    """The lesser of two; null where either is."""
    return pl.when(one.is_not_null() & other.is_not_null()).then(pl.min_horizontal(one, other))


def _scaled(margin: pl.Expr) -> pl.Expr:
    """A margin in units of its root mean square inside language and criterion; where all margins are 0 there is none."""
    margin = margin.fill_nan(None)
    size = margin.pow(2).mean().sqrt().over(_TOGETHER)
    return pl.when(size > 0).then(margin / size)


_SCORE = pl.col("score")
_IMPLICIT = pl.col("implicit_margin")
_JUDGED = pl.col("chosen_score") - pl.col("rejected_score")
_INFLUENCE = pl.col("score") * pl.col("gradient_norm")
"""<g_i, u> / |u|: to first order what a step on the pair does along the merged direction."""
_UNJUDGED = (
    "the pairs have no judge scores",
    "Imported pairs need pairs.sources.fields.chosen_score and rejected_score to be ranked by margin.",
)
_TOKENS = pl.col("n_tokens")

FILTERS: Mapping[str, Filter] = {
    "conflict": Filter(("score",), _expression(_SCORE)),
    "random": Filter((), _random),
    "margin": Filter(("chosen_score", "rejected_score"), _expression(_JUDGED), _UNJUDGED),
    "implicit": Filter(("implicit_margin",), _expression(_IMPLICIT), implicit=True),
    "smallest_gap": Filter(("implicit_margin",), _expression(-_IMPLICIT), implicit=True),
    "medium_influence": Filter(("score", "gradient_norm"), _expression(_middle(_INFLUENCE))),
    "lossdiff_irm": Filter(
        ("score", "gradient_norm", "implicit_margin"),
        _expression(_both(_middle(_INFLUENCE), _middle(_IMPLICIT))),
        implicit=True,
    ),
    "fused_margin": Filter(
        ("chosen_score", "rejected_score", "implicit_margin"),
        _expression(_scaled(_JUDGED) + _scaled(_IMPLICIT)),
        _UNJUDGED,
        implicit=True,
    ),
    "logp_margin": Filter(("logp_margin",), _expression(pl.col("logp_margin"))),
    "mean_direction": Filter(("score_mean",), _expression(pl.col("score_mean"))),
    "own_language": Filter(
        ("cosine_own",),
        _expression(pl.col("cosine_own")),
        ("no language has a second pair", "Rank by another one."),
    ),
    "other_languages": Filter(
        ("score_others",),
        _expression(pl.col("score_others")),
        ("there is only one language", "Rank by another one."),
    ),
    "mid_band": Filter(("score",), _expression(_middle(_SCORE))),
    "shortest": Filter(("n_tokens",), _expression(-_TOKENS.cast(pl.Float64))),
    "longest": Filter(("n_tokens",), _expression(_TOKENS)),
    "bottom": Filter(("score",), _expression(-_SCORE)),
}
"""Name in `select.by` -> filter. docs/methods.md, section 4, has what each one is and its source."""
