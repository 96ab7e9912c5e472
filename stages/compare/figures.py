"""What selections on one pool have in common and where they differ: counts, means, overlap, and what only one of them keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from stages.compare.pool import Arm, Pool
from stages.text.codes import in_order


@dataclass(frozen=True)
class Measure:
    """A mean over pairs. columns: what it reads; table: where they are; a run may lack them (no judge scores, an older version)."""

    name: str
    meaning: str
    columns: tuple[str, ...]
    value: pl.Expr
    table: str = "gradients"


_CHOSEN, _REJECTED = pl.col("logp_chosen") / pl.col("n_chosen"), pl.col("logp_rejected") / pl.col("n_rejected")

MEASURES = (
    Measure("tokens", "tokens of both answers", ("n_chosen", "n_rejected"), pl.col("n_chosen") + pl.col("n_rejected")),
    Measure(
        "length_difference",
        "tokens of chosen minus rejected",
        ("n_chosen", "n_rejected"),
        pl.col("n_chosen") - pl.col("n_rejected"),
    ),
    Measure("judge_score", "judge score of chosen", ("chosen_score",), pl.col("chosen_score"), "pairs"),
    Measure(
        "judge_margin",
        "judge score of chosen minus rejected",
        ("chosen_score", "rejected_score"),
        pl.col("chosen_score") - pl.col("rejected_score"),
        "pairs",
    ),
    Measure("likelihood", "mean-token log-probability of chosen", ("logp_chosen", "n_chosen"), _CHOSEN),
    Measure(
        "likelihood_margin",
        "the same of chosen minus rejected",
        ("logp_chosen", "n_chosen", "logp_rejected", "n_rejected"),
        _CHOSEN - _REJECTED,
    ),
    Measure("relevance", "relevance of chosen to its prompt", ("relevance_chosen",), pl.col("relevance_chosen")),
    Measure(
        "relevance_margin",
        "relevance of chosen minus rejected",
        ("relevance_chosen", "relevance_rejected"),
        pl.col("relevance_chosen") - pl.col("relevance_rejected"),
    ),
)


@dataclass(frozen=True)
class Example:
    """A pair with its texts: the last message of the prompt, and the answers."""

    pair_id: str
    language: str
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Selected:
    """An arm on the pool. errors: known errors (`label_error`) that it keeps, by kind; means: by the name of the measure; overlap: share of what the smaller of two keeps that both keep, by the other's
    name; only: how many pairs it alone keeps, examples: some of them, those it ranks highest."""

    name: str
    settings: tuple[str, ...]
    kept: int
    languages: dict[str, int]
    errors: dict[str, int]
    means: dict[str, float]
    overlap: dict[str, float]
    only: int
    examples: list[Example]


@dataclass(frozen=True)
class Comparison:
    """pool: pairs that every arm can rank, of so many training pairs; unranked: how many each arm cannot; errors, means: of the whole pool."""

    pool: int
    training: int
    unranked: dict[str, int]
    languages: dict[str, int]
    errors: dict[str, int]
    means: dict[str, float]
    arms: list[Selected]


def compared(
    arms: Sequence[Arm], pool: Pool, tables: Mapping[str, list[Path]], languages: Sequence[str], examples: int
) -> Comparison:
    """Every figure of the arms on their pool.

    tables: files of pairs and gradients; languages: the run's, in its order; examples: how many pairs with texts per arm.
    """
    frame = pool.pairs.join(_measured(tables), on="pair_id", how="left", maintain_order="left")
    order = in_order(languages, frame["language"].to_list())
    votes = pl.DataFrame({str(n): kept for n, kept in enumerate(pool.kept.values())}).sum_horizontal()
    alone = {name: kept & (votes == 1) for name, kept in pool.kept.items()} if len(arms) > 1 else {}
    shown = {name: _first(pool, mask, name, examples) for name, mask in alone.items()}
    texts = _texts(tables["pairs"], [pair_id for ids in shown.values() for pair_id in ids])
    selected = []
    for arm in arms:
        kept = pool.kept[arm.name]
        mine = frame.filter(kept)
        selected.append(
            Selected(
                arm.name,
                arm.settings,
                mine.height,
                _counts(mine, order),
                _errors(mine, frame),
                _means(mine),
                {name: _overlap(kept, other) for name, other in pool.kept.items() if name != arm.name},
                int(alone[arm.name].sum()) if alone else 0,
                [texts[pair_id] for pair_id in shown.get(arm.name, [])],
            )
        )
    return Comparison(
        frame.height,
        pool.training,
        pool.unranked,
        _counts(frame, order),
        _errors(frame, frame),
        _means(frame),
        selected,
    )


def _measured(tables: Mapping[str, list[Path]]) -> pl.DataFrame:
    """pair_id, `label_error` if the pairs have it, and a column per measure that the tables have the columns for."""
    frames = []
    for table in ("pairs", "gradients"):
        scan = pl.scan_parquet(tables[table], glob=False)
        there = set(scan.collect_schema().names())
        possible = [m for m in MEASURES if m.table == table and there.issuperset(m.columns)]
        errors = ["label_error"] if table == "pairs" and "label_error" in there else []
        means = (m.value.cast(pl.Float64).alias(f"mean {m.name}") for m in possible)
        frames.append(scan.select("pair_id", *errors, *means).collect())
    return frames[0].join(frames[1], on="pair_id", how="left", maintain_order="left")


def _means(frame: pl.DataFrame) -> dict[str, float]:
    found: dict[str, Any] = frame.select(pl.col("^mean .*$").fill_nan(None).mean()).row(0, named=True)
    return {name.removeprefix("mean "): float(value) for name, value in found.items() if value is not None}


def _counts(frame: pl.DataFrame, order: Sequence[str]) -> dict[str, int]:
    counts = dict(frame.group_by("language").len().iter_rows())
    return {language: counts.get(language, 0) for language in order}


def _errors(frame: pl.DataFrame, pool: pl.DataFrame) -> dict[str, int]:
    """Known errors by kind; kinds are those of the pool."""
    if "label_error" not in pool.columns:
        return {}
    counts = dict(frame.group_by("label_error").len().iter_rows())
    return {kind: counts.get(kind, 0) for kind in sorted(filter(None, pool["label_error"].unique()))}


def _overlap(one: pl.Series, other: pl.Series) -> float:
    return int((one & other).sum()) / max(1, min(int(one.sum()), int(other.sum())))


def _first(pool: Pool, alone: pl.Series, name: str, n: int) -> list[str]:
    """Ids of the first pairs, as the arm ranks them, that it alone keeps."""
    found = pool.pairs.select("pair_id", place=pool.places[name]).filter(alone).sort("place").head(n)
    return found["pair_id"].to_list()


def _texts(files: list[Path], ids: Sequence[str]) -> dict[str, Example]:
    last = (pl.col(name).list.last().struct.field("content").alias(name) for name in ("prompt", "chosen", "rejected"))
    rows = pl.scan_parquet(files, glob=False).filter(pl.col("pair_id").is_in(list(ids)))
    return {row["pair_id"]: Example(**row) for row in rows.select("pair_id", "language", *last).collect().to_dicts()}
