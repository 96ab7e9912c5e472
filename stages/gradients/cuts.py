"""Where relevance is cut: which answers are no answers to their prompts. What relevance and its null are: `stages.gradients.relevance`.

An answer that is not above a value of the null is no answer to its prompt. Which value depends on how many off-topic answers there are (`_best`): where there
are none, good answers that the model finds hardly likelier must not pay for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from schemas.config.curation import RelevanceConfig
from schemas.errors import UserError

COLUMNS = ("relevance_chosen", "relevance_rejected", "null_chosen", "null_rejected")
"""Of the tables gradients and contributions: r of both answers under their prompt, and under another one (of a sample)."""
_MOST = 0.5
"""Where more answers than this share seem to be off-topic, of those a cut is made of or of a small language's own, the model cannot tell: there is no
gate then. No cut drops more either."""
Side = Literal["chosen", "rejected"]


@dataclass(frozen=True)
class Cut:
    """An answer of this language and side at or below `value` is no answer to its prompt; None: there is no cut, and `why` it cannot be made
    (empty: none is needed).

    n: answers under other prompts it is one of; pooled: of all languages, since this one has too few.
    """

    language: str
    side: Side
    value: float | None
    n: int
    pooled: bool = False
    why: str = ""


def cuts(sample: pl.DataFrame, languages: Sequence[str], config: RelevanceConfig) -> list[Cut]:
    """The cut of every language and of every side that the gate looks at.

    sample: language and `COLUMNS`; the cut is made of the rows with a null: it is where dropping gains most, at most the quantile q
    of the null. A quantile of n values is one only with n (1 - q) >= 1: a language with fewer takes the cut of all languages together, and where these are
    too few there is no gate. Nor is there one where more than half of the answers it is made of seem to be off-topic, or a small language's own
    miss the cut of all: the model cannot tell there.
    """
    sides: tuple[Side, ...] = {"none": (), "both": ("chosen", "rejected")}.get(config.sides, (config.sides,))  # type: ignore[assignment]
    least = math.ceil(round(1 / (1 - config.quantile), 9))
    found = []
    for side in sides:
        own, null = f"relevance_{side}", f"null_{side}"
        known = sample.select("language", own, null).fill_nan(None).drop_nulls()
        for language in languages:
            mine = known.filter(pl.col("language") == language)
            pooled = mine.height < least
            if pooled:
                mine = known
            if mine.height < least:
                why = f"{mine.height} answers under other prompts are too few for a quantile of {config.quantile:g}"
                found.append(Cut(language, side, None, mine.height, pooled, why))
                continue
            own_N, null_N = mine[own].to_numpy(), mine[null].to_numpy()
            share = _off_topic(own_N, null_N)
            value = _best(own_N, null_N, share, config)
            whose, missing, why = " of all languages" if pooled else "", share, ""
            if pooled and value is not None and share <= _MOST:
                theirs = sample.filter(pl.col("language") == language)[own].fill_nan(None).drop_nulls()
                whose, missing = "", int((theirs <= value).sum()) / max(len(theirs), 1)
            if missing > _MOST:
                value = None
                why = (
                    f"{missing:.0%} of the {side} answers{whose} are no likelier under their own prompt than others are"
                )
            found.append(Cut(language, side, value, mine.height, pooled, why))
    return found


def _off_topic(own_N: np.ndarray, null_N: np.ndarray) -> float:
    """The share of answers that are off-topic, if these are as relevant as the null is.

    Storey's estimate (J. R. Statist. Soc. B 64, 2002; with the 1 that Storey, Taylor and Siegmund, 66, 2004, add for small samples): the share
    of answers with p > lambda, over 1 - lambda. Good answers among them make it too large, fewest with 1/2, and so do off-topic ones below the null,
    least with 0.05: it is the lower of the two.

    own_N, null_N: relevance of the same answers [N] under their own prompt and under another.
    """
    n = len(null_N)
    p_N = (1 + n - np.searchsorted(np.sort(null_N), own_N, side="left")) / (n + 1)
    return min(1.0, *((1 + int((p_N > part).sum())) / (n * (1 - part)) for part in (0.5, 0.05)))


def _best(own_N: np.ndarray, null_N: np.ndarray, share: float, config: RelevanceConfig) -> float | None:
    """The value of the null at which dropping gains most: `off_topic_cost` for every off-topic answer at or below it, less one for every other; the
    lowest of equal ones. It is at most the null's quantile, and at most half of the answers are dropped. None: dropping gains nothing anywhere.

    own_N, null_N: as in `_off_topic`; share: what it says.
    """
    null_N, own_N = np.sort(null_N), np.sort(own_N)
    n = len(null_N)
    highest = np.quantile(null_N, config.quantile, method="higher")
    cut_C = np.unique(null_N[null_N <= highest])
    dropped_C = np.searchsorted(own_N, cut_C, side="right")
    off_C = share * np.searchsorted(null_N, cut_C, side="right")
    gain_C = np.where(dropped_C <= _MOST * n, (1 + config.off_topic_cost) * off_C - dropped_C, 0.0)
    best = int(gain_C.argmax())
    return float(cut_C[best]) if gain_C[best] > 0 else None


def notes(found: Sequence[Cut]) -> list[str]:
    """What people should know about the cuts: where there is none, and where it is of all languages together."""
    said = []
    for cut in found:
        if cut.why:
            said.append(f"{cut.language}: no gate against off-topic {cut.side} answers: {cut.why}")
    if pooled := [cut for cut in found if cut.pooled and cut.value is not None]:
        names = ", ".join(dict.fromkeys(cut.language for cut in pooled))
        said.append(
            f"{names}: too few pairs for a cut of their own: the gate against off-topic answers takes that of all languages together"
        )
    return said


def all_off_topic() -> UserError:
    """The error of a run in which the gate holds back every pair."""
    return UserError(
        "Every pair is off-topic: no answer is likelier under its prompt than answers to other prompts are",
        where="conflict.relevance",
        fix="Look at the pairs, or let all pass: conflict.relevance.sides: none.",
    )


def relevant(frame: pl.DataFrame, found: Sequence[Cut]) -> pl.Series:
    """Whether a pair passes every cut of its language [N]; what is not known passes. frame: language and `COLUMNS`."""
    passes = pl.lit(True)
    for cut in found:
        if cut.value is not None:
            value = pl.col(f"relevance_{cut.side}").cast(pl.Float64)
            missed = (pl.col("language") == cut.language) & value.is_not_nan() & (value <= cut.value)
            passes = passes & ~missed.fill_null(False)
    return frame.with_columns(relevant=passes)["relevant"]
