"""Conflict: language directions, gradient surgery over them, and a score for every pair (docs/methods.md section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from schemas.errors import UserError
from schemas.tables import FEW_PAIRS, TABLES
from stages.conflict.directions import cosines, count_conflicts, grams
from stages.conflict.prepare import surgery_of
from stages.conflict.scores import PairScores
from stages.conflict.sources import GradientSource, open_source
from stages.conflict.stream import Columns
from stages.conflict.table import held_rows, score_rows
from stages.contract import Account, Context, Rows, TableStage, tally
from stages.surgery.methods import Surgery

_FEW_TRUSTED = 8
"""Of trusted pairs, which carry no wrong labels, as many do nearly what many do (docs/evidence.md)."""


class Conflict(TableStage):
    """gradients, pairs -> scores, gram, directions. Unit `pair`: every pair with a gradient gets a row, last those that the relevance gate
    holds back: they are in no direction and have no score."""

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """See TableStage.run. Raises UserError for sketches that cannot be compared, an unknown surgery, or where no pair can have a score."""
        config = ctx.config.conflict
        with closing(open_source(ctx)) as source:
            method = surgery_of(ctx, source.languages)
            for note in [*source.gate.notes, *_notes(source, config.target), *source.notes()]:
                ctx.progress.note(note)
            scopes: dict[str, Columns] = {"model": slice(None), **source.blocks}
            used = dict(source.blocks) if config.scope == "layer" else {"model": scopes["model"]}
            measured = source.measure(scopes)
            for note in measured.notes:
                ctx.progress.note(note)
            with closing(source.score(measured.directions_LD, list(used.values()), method)) as scores:
                start, trained = 0, source.frame["split"] == "train"
                if missing := _without_score(scores, config.against, torch.from_numpy(trained.to_numpy())):
                    ctx.progress.note(missing)
                others = config.against == "others"
                for rows in score_rows(source.frame, source.languages, scores, source.weight_N, others):
                    yield Rows("scores", rows.filter(trained[start : start + len(rows)].to_arrow()))
                    start += len(rows)
                yield Rows("scores", held_rows(source.gate.held))
                correlations = _correlations(source.frame, scores, config.against)
        grams_SLL = grams(measured.directions_LD, list(scopes.values()))
        yield Rows("gram", _gram_rows(list(scopes), source.languages, grams_SLL, measured.negative_SL))
        counts = source.count_L.tolist()
        yield Rows("directions", _direction_rows(used, source.languages, measured.directions_LD, method, counts))
        count = sum(number > 0 for number in counts)
        stats = {
            "conflicting_language_pairs": float(count_conflicts(grams_SLL[0])),
            "language_pairs": float(count * (count - 1) // 2),
            **measured.stats,
            **source.gate.stats,
            **correlations,
        }
        pairs = [*source.frame.filter(trained)["language"], *source.gate.held["language"]]
        yield Account(tally("pair", pairs, []), stats=stats)


def _notes(source: GradientSource, target: Literal["train", "dev"]) -> list[str]:
    notes = []
    if target != "train":
        trusted = int(source.count_L.sum())
        notes.append(
            f"{source.frame.height - trusted} training pairs are scored against the directions of {trusted} pairs of the {target} split"
        )
    counts = dict(zip(source.languages, source.count_L.tolist(), strict=True))
    least, which = (FEW_PAIRS, "pairs") if target == "train" else (_FEW_TRUSTED, "trusted pairs")
    few = [
        f"{language} {count}" for language, count in counts.items() if count < least and (count or target == "train")
    ]
    if few:
        notes.append(f"fewer than {least} {which} ({', '.join(few)}): these languages' directions are mostly noise")
    if len(counts) == 1:
        (language,) = counts
        notes.append(f"one language only ({language}): pairs are scored against their own language's direction")
    return notes


def _without_score(scores: PairScores, used: Literal["all", "others"], trained_N: Tensor) -> str | None:
    """How many training pairs have no score, and why. Raises UserError where none has one."""
    valid_n = scores.used(used == "others")[1][trained_N]
    total = len(valid_n)
    if bool(valid_n.all()):
        return None
    zero_n, alone_n = scores.flags["zero_gradient"][trained_N], scores.alone[trained_N]
    zero = int(zero_n.sum())
    gone = int((alone_n & ~zero_n).sum())
    rest = int((~valid_n).sum()) - zero - int((alone_n & ~valid_n & ~zero_n).sum())
    why = []
    if zero:
        why.append(f"{zero} have a gradient of zero (the loss gives them no weight, or both answers the same gradient)")
    if gone:
        why.append(
            f"with {gone} every pair of the other languages leaves (they hang together by shared answers or translation groups: conflict.leave_out)"
        )
    if rest > 0:
        why.append(
            f"{rest} have no direction left to compare with (conflict.surgery, conflict.score, conflict.language_weights)"
        )
    if bool(valid_n.any()):
        return f"{int((~valid_n).sum())} of {total} pairs have no score: {'; '.join(why)}"
    fix = (
        "Let pairs leave alone: conflict.leave_out: pair."
        if gone
        else "Give more pairs, or look at the gradients' norms."
    )
    if int(scores.flags["single_language"].sum()) and total < 2:
        fix = "Give more pairs: a pair is compared with the others."
    raise UserError(f"No pair can have a conflict score: {'; '.join(why)}", where="conflict", fix=fix)


def _gram_rows(scopes: Sequence[str], languages: Sequence[str], grams_SLL: Tensor, negative_SL: Tensor) -> pa.Table:
    """negative_SL: share of negative cosines between random halves of the same language: sampling noise."""
    cosine_SLL, ok_SLL = cosines(grams_SLL)
    rate_SLL = ((negative_SL[:, :, None] + negative_SL[:, None, :]) / 2).numpy()
    n = len(languages)
    one, two = np.repeat(np.arange(n), n), np.tile(np.arange(n), n)
    names = pa.array(languages, pa.string())
    tables = []
    for s, scope in enumerate(scopes):
        rate = rate_SLL[s].reshape(-1).astype(np.float64)
        columns = {
            "scope": pa.array([scope] * n * n),
            "language": names.take(pa.array(one)),
            "other": names.take(pa.array(two)),
            "dot": pa.array(grams_SLL[s].flatten().numpy()),
            "cosine": pa.array(cosine_SLL[s].flatten().numpy(), mask=~ok_SLL[s].flatten().numpy()),
            "null_negative_rate": pa.array(rate, mask=np.isnan(rate)),
        }
        tables.append(pa.table(columns, schema=TABLES["gram"].schema))
    return pa.concat_tables(tables)


def _direction_rows(
    scopes: Mapping[str, Columns],
    languages: Sequence[str],
    directions_LD: Tensor,
    method: Surgery,
    counts: Sequence[int],
) -> pa.Table:
    rows = []
    for scope, columns in scopes.items():
        part_LD = directions_LD[:, columns]
        gram_LL = part_LD @ part_LD.T
        weight_L = method(gram_LL)
        for n, language in enumerate(languages):
            rows.append(
                {
                    "scope": scope,
                    "language": language,
                    "n_pairs": counts[n],
                    "norm": float(gram_LL[n, n].clamp_min(0).sqrt()),
                    "weight": float(weight_L[n]),
                    "conflicts": int((gram_LL[n] < 0).sum()),
                    "direction": part_LD[n].float().numpy(),
                }
            )
    return pa.Table.from_pylist(rows, schema=TABLES["directions"].schema)


def _correlations(frame: pl.DataFrame, scores: PairScores, used: Literal["all", "others"]) -> dict[str, float]:
    """Pearson correlation of the score with what it should not be about: length and gradient norm."""
    value_N, valid_N = scores.used(used == "others")
    values = pl.Series(value_N.numpy()).set(pl.Series(~valid_N.numpy()), None)
    trained = frame["split"] == "train"
    table = (
        frame.select(
            length=(pl.col("n_chosen") + pl.col("n_rejected")).cast(pl.Float64),
            length_difference=(pl.col("n_chosen") - pl.col("n_rejected")).cast(pl.Float64),
            norm=pl.col("norm").cast(pl.Float64),
        )
        .with_columns(score=values)
        .filter(trained)
    )
    correlations = {}
    for name in ("length", "length_difference", "norm"):
        value = table.select(pl.corr("score", name)).item()
        if value is not None and np.isfinite(value):
            correlations[f"correlation_with_{name}"] = value
    return correlations
