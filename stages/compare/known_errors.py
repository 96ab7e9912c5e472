"""What became of pairs that the data itself says are wrong (`pairs.sources.fields.label_error`): the one truth that needs no judge.

Curation never looks at the column. An error is found if it is not among the curated pairs, whichever stage it left at; what chance alone would
have found is said beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from stages.pairs.imported import LABEL_ERRORS

DECILES = 10


@dataclass(frozen=True)
class KnownErrors:
    """Known errors of one kind among the rows that were not held out.

    total: of them all; before: left before the ranking (language, length, duplicates, no gradient, ...); kept: still among the curated.
    above: share of the pairs without known error that are ranked above one of them, within its language (0.5: blind, 1: all); None without
    such pairs. deciles: how many stand in each tenth of their language's ranking, the best first. chance: found, had the same share been drawn.
    """

    kind: str
    total: int
    before: int
    kept: int
    above: float | None
    deciles: list[int]
    chance: float

    @property
    def found(self) -> int:
        """Errors that are not among the curated pairs."""
        return self.total - self.kept


def known_errors(
    pairs: Sequence[Path], curated: Sequence[Path], rejected: Sequence[Path], stats: Mapping[str, float]
) -> list[KnownErrors]:
    """By kind, the commonest first; empty where the data says nothing. stats: of the pairs stage, which saw every row."""
    totals = {name.removeprefix(LABEL_ERRORS): round(n) for name, n in stats.items() if name.startswith(LABEL_ERRORS)}
    if not totals:
        return []
    known = pl.scan_parquet(list(pairs), glob=False).select("pair_id", "split", "label_error").collect()
    ranked = _ranked(curated, rejected).join(known.select("pair_id", "label_error"), on="pair_id", how="left")
    share = ranked["kept"].mean()
    found = []
    for kind, read in totals.items():
        held_out = known.filter((pl.col("label_error") == kind) & (pl.col("split") != "train")).height
        mine = ranked.filter(pl.col("label_error") == kind)
        kept, placed = int(mine["kept"].sum()), mine.drop_nulls("place")
        before = read - held_out - mine.height
        chance = before + mine.height * (1 - float(share or 0.0))  # type: ignore[arg-type]
        found.append(KnownErrors(kind, read - held_out, before, kept, _above(ranked, placed), _deciles(placed), chance))
    return sorted(found, key=lambda errors: (-errors.total, errors.kind))


def sentences(errors: Sequence[KnownErrors]) -> list[str]:
    """`Found 21 of 24 pairs with the known error flip (chance alone: 12)` for each kind."""
    return [
        f"Found {e.found} of {e.total} known errors of the kind {e.kind}: not among the curated pairs (chance alone: {e.chance:.0f})"
        for e in errors
        if e.total
    ]


def _ranked(curated: Sequence[Path], rejected: Sequence[Path]) -> pl.DataFrame:
    """pair_id, language, kept, and place: 0 for the first of its language, 1 for the last; null where it was not ranked."""
    frames = [
        pl.scan_parquet(list(files), glob=False).select("pair_id", "language", "conflict_score", kept=pl.lit(kept))
        for files, kept in ((curated, True), (rejected, False))
    ]
    rank = pl.col("conflict_score").rank("average", descending=True).over("language")
    n = pl.col("conflict_score").count().over("language")
    return pl.concat(frames).with_columns(place=(rank - 0.5) / n).collect()


def _above(ranked: pl.DataFrame, placed: pl.DataFrame) -> float | None:
    """The AUROC of the ranking inside each language, weighted by the pairs of both kinds that it compares."""
    wins = compared = 0.0
    for language, mine in placed.group_by("language"):
        good = ranked.filter((pl.col("language") == language[0]) & (pl.col("label_error").fill_null("") == ""))
        scores = np.sort(good["conflict_score"].drop_nulls().to_numpy())
        values = mine["conflict_score"].to_numpy()
        low, high = (np.searchsorted(scores, values, side) for side in ("left", "right"))
        wins += float((len(scores) - high).sum() + 0.5 * (high - low).sum())
        compared += len(scores) * len(values)
    return wins / compared if compared else None


def _deciles(placed: pl.DataFrame) -> list[int]:
    counts = [0] * DECILES
    for place in placed["place"]:
        counts[min(DECILES - 1, int(place * DECILES))] += 1
    return counts
