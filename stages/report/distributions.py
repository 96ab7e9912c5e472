"""Histograms: conflict scores per language; lengths, judge scores and relevance of chosen against rejected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from markupsafe import Markup

from schemas.config.judging import JudgeConfig
from stages.report.charts import Series, bin_counts, distributions, histogram
from stages.report.data import Tables
from stages.report.text import fixed
from stages.text.codes import in_order

_BINS = 24


@dataclass(frozen=True)
class ScoreHistogram:
    """Scores of one language; cut: the lowest kept score, None when pairs were not ranked by this score."""

    language: str
    kept: int
    dropped: int
    median: float | None
    cut: float | None
    chart: Markup


@dataclass(frozen=True)
class Scores:
    """One round's score histograms, and the score's rank correlation with length difference and norm."""

    round: int
    histograms: list[ScoreHistogram]
    unscored: int
    correlations: list[tuple[str, float]]


def scores(tables: Tables, round_: int, languages: Sequence[str], by_conflict: bool) -> Scores | None:
    """None without scored pairs. Pairs in neither curated nor rejected (select not run yet) count as dropped: no."""
    frame = tables.read("scores", round_, ["pair_id", "language", "score", "norm"])
    if frame.is_empty():
        return None
    kept_ids = tables.read("curated", round_, ["pair_id"])["pair_id"]
    selected = tables.has("curated", round_)
    frame = frame.with_columns(kept=pl.col("pair_id").is_in(kept_ids.implode()))
    scored = frame.filter(pl.col("score").is_finite())
    if scored.is_empty():
        return Scores(round_, [], len(frame), [])
    low, high = _range(scored["score"])
    edges = np.histogram_bin_edges([low, high], _BINS).tolist()
    histograms = []
    for language in in_order(languages, scored["language"].to_list()):
        mine = scored.filter(language=language)
        kept, dropped = mine.filter("kept")["score"], mine.filter(~pl.col("kept"))["score"]
        cut = float(kept.min()) if by_conflict and len(kept) and len(dropped) else None  # type: ignore[arg-type]
        stack = [
            Series("kept", "kept", bin_counts(kept.to_list(), edges)),
            Series("dropped", "dropped0", bin_counts(dropped.to_list(), edges)),
        ]
        if not selected:
            stack = [Series("scored, not yet selected", "plain", bin_counts(mine["score"].to_list(), edges))]
        label = f"Conflict scores in {language}: {len(kept)} kept, {len(dropped)} dropped" + (
            f", cut at {fixed(cut)}" if cut is not None else ""
        )
        histograms.append(
            ScoreHistogram(
                language, len(kept), len(dropped), _median(mine["score"]), cut, histogram(edges, stack, label, cut=cut)
            )
        )
    return Scores(round_, histograms, len(frame) - len(scored), _correlations(tables, round_, scored))


def _correlations(tables: Tables, round_: int, scored: pl.DataFrame) -> list[tuple[str, float]]:
    lengths = tables.read("gradients", round_, ["pair_id", "n_chosen", "n_rejected"])
    joined = scored.join(lengths, on="pair_id", how="left").with_columns(
        total=pl.col("n_chosen") + pl.col("n_rejected"), difference=pl.col("n_chosen") - pl.col("n_rejected")
    )
    named = {
        "answer length (both together)": "total",
        "length difference (chosen minus rejected)": "difference",
        "norm of the pair's gradient": "norm",
    }
    found = []
    for name, column in named.items():
        both = joined.select("score", column).drop_nulls()
        value = both.select(pl.corr("score", column, method="spearman")).item() if len(both) > 2 else None
        if value is not None and value == value:
            found.append((name, float(value)))
    return found


@dataclass(frozen=True)
class Sides:
    """Chosen against rejected of one quantity. rows: language, n, median chosen, median rejected, mean difference; beside: name of a third outline."""

    title: str
    unit: str
    chart: Markup
    rows: list[tuple[str, int, float | None, float | None, float | None]]
    beside: str = ""


def sides(tables: Tables, round_: int, languages: Sequence[str], judge: JudgeConfig | None = None) -> list[Sides]:
    """Lengths (tokens where gradients were computed, else characters), judge scores and relevance of a round's training pairs.

    judge: who scored them, a figure for each criterion; None: the scores came with the data.
    """
    built = []
    lengths = (
        tables.read("gradients", round_, ["language", "n_chosen", "n_rejected", "split"])
        .filter(split="train")
        .drop("split")
    )
    pairs = tables.scan("pairs", round_).filter(split="train")
    unit = "tokens"
    if lengths.is_empty():
        unit = "characters"
        characters = (_characters(side).alias(f"{side}_text") for side in ("chosen", "rejected"))
        lengths = pairs.select("language", *characters).collect()
    built.append(_sides("Answer length", unit, lengths, languages, whole=True))
    judged = pairs.filter(pl.col("chosen_score").is_not_null() & pl.col("rejected_score").is_not_null())
    for criterion in judge.criteria if judge and judge.criteria else [""]:
        unit, bounds = judge.scale_of(criterion) if judge else ("the data's own", None)
        mine = judged.filter(criterion=criterion) if criterion else judged
        frame = mine.select("language", "chosen_score", "rejected_score").collect()
        title = f"Judge score: {criterion}" if criterion else "Judge score"
        built.append(_sides(title, unit, frame, languages, whole=False, bounds=bounds))
    names = ["relevance_chosen", "relevance_rejected", "null_chosen", "null_rejected"]
    measured = tables.read("gradients", round_, ["split", "language", *names]).filter(split="train")
    own = measured.select("language", *names[:2]).drop_nulls()
    other = pl.concat([measured[name] for name in names[2:]]).drop_nulls()
    built.append(
        _sides("Relevance", "nats a token", own, languages, whole=False, beside=("under another prompt", other))
    )
    return [one for one in built if one is not None]


def _characters(side: str) -> pl.Expr:
    return pl.col(side).list.eval(pl.element().struct.field("content").str.len_chars()).list.sum()


def _sides(
    title: str,
    unit: str,
    frame: pl.DataFrame,
    languages: Sequence[str],
    whole: bool,
    beside: tuple[str, pl.Series] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Sides | None:
    """beside: (name, values) of a third outline. bounds: of the axis; None: it reaches over all values but the outer hundredths."""
    if frame.is_empty():
        return None
    frame = frame.rename({frame.columns[1]: "chosen", frame.columns[2]: "rejected"})
    if whole:
        high = _quantile(pl.concat([frame["chosen"], frame["rejected"]]), 0.99) + 1
        edges = np.linspace(0, high, _BINS + 1).tolist()
    elif bounds is not None:
        edges = np.linspace(*bounds, 21).tolist()
    else:
        values = pl.concat([frame["chosen"], frame["rejected"], *([] if beside is None else [beside[1]])])
        low, high = _quantile(values, 0.01), _quantile(values, 0.99)
        edges = np.histogram_bin_edges([low, high], _BINS).tolist()
    series = [
        Series(name, css, bin_counts(frame[name].to_list(), edges))
        for name, css in (("chosen", "kept"), ("rejected", "dropped0"))
    ]
    if beside is not None:
        series.append(Series(beside[0], "other", bin_counts(beside[1].to_list(), edges)))
    rows = []
    for language in in_order(languages, frame["language"].to_list()):
        mine = frame.filter(language=language)
        gap = (mine["chosen"] - mine["rejected"]).mean()
        rows.append((language, len(mine), _median(mine["chosen"]), _median(mine["rejected"]), _float(gap)))
    label = f"{title} ({unit}) of chosen and rejected answers, {len(frame)} pairs"
    return Sides(title, unit, distributions(edges, series, label), rows, "" if beside is None else beside[0])


def _range(values: pl.Series) -> tuple[float, float]:
    low, high = _float(values.min()), _float(values.max())
    return low or 0.0, high or 0.0


def _quantile(values: pl.Series, share: float) -> float:
    return _float(values.quantile(share)) or 0.0


def _median(values: pl.Series) -> float | None:
    return _float(values.median())


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
