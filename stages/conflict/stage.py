"""Conflict: language directions, gradient surgery over them, and a score for every pair (METHODS.md section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from schemas.ids import seed_for
from schemas.tables import TABLES
from stages.conflict.directions import conflicts as count_conflicts
from stages.conflict.directions import cosines, grams, signed_directions
from stages.conflict.groups import leaving_together, with_common_answer
from stages.conflict.null import flip_signs, half_masks, sign_flip_null, split_half_null
from stages.conflict.prepare import Prepared, surgery_of
from stages.conflict.products import ProductStore
from stages.conflict.scores import Scores
from stages.conflict.scoring import KEPT_BYTES, score_pairs, score_products
from stages.conflict.scratch import Kept
from stages.conflict.stream import Columns, as_slice
from stages.conflict.surgery import Surgery
from stages.conflict.table import score_rows
from stages.contract import Account, Context, Rows, TableStage, tally

MIN_PAIRS = 20
"""A language with fewer pairs is flagged: its direction is mostly noise."""
_DRAWS = 20


class Conflict(TableStage):
    """gradients, pairs -> scores, gram, directions. Unit `pair`: every pair with a gradient gets a row."""

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """See TableStage.run. Raises UserError for sketches that cannot be compared, or an unknown surgery."""
        if "sums" in ctx.inputs:
            yield from _of_products(ctx)
            return
        config, ready = ctx.config.conflict, Prepared.of(ctx)
        frame, languages, language_N, group_N = ready.store.frame, ready.languages, ready.language_N, ready.group_N
        scopes: dict[str, Columns] = {"model": slice(None), **ready.blocks}
        used: dict[str, Columns] = ready.blocks if config.scope == "layer" else {"model": slice(None)}
        method = surgery_of(ctx, len(languages))
        common = 0 if config.leave_out == "pair" else with_common_answer(frame)
        for note in _notes(languages, language_N, group_N, common):
            ctx.progress.note(note)

        ctx.progress.total(2 * frame.height + ready.read_before, "sketches")
        chunks, scale_D = ready.chunks(ctx.progress.advance)
        seed = seed_for(ctx.config.seed, ctx.round, "null")
        flips_RN = flip_signs(len(language_N), _DRAWS, seed)
        sharing_N = leaving_together(frame, "answers") if group_N is None else group_N
        assert sharing_N is not None
        halves_RN = half_masks(language_N, sharing_N, len(languages), _DRAWS, seed)
        labels_N = torch.arange(len(language_N)) if group_N is None else group_N
        with Kept(labels_N, KEPT_BYTES, ctx.scratch) as kept:
            directions_LD, signed_RLD = signed_directions(
                chunks,
                language_N,
                ready.omega_N,
                len(languages),
                torch.cat([flips_RN, halves_RN]),
                scale_D=scale_D,
                keep=kept.put,
            )
            assert signed_RLD is not None
            flips = sign_flip_null(signed_RLD[:_DRAWS])
            noise = split_half_null(signed_RLD[_DRAWS:], directions_LD, list(scopes.values()))
            del signed_RLD
            scores = score_pairs(
                chunks,
                language_N,
                ready.omega_N,
                directions_LD,
                method,
                columns=list(used.values()),
                scale_D=scale_D,
                refit=config.refit,
                min_pairs=MIN_PAIRS,
                kept=kept,
                advance=ctx.progress.advance,
            )
        for rows in score_rows(frame, languages, scores, ready.weights.weight_N, config.score == "others"):
            yield Rows("scores", rows)

        grams_SLL = grams(directions_LD, list(scopes.values()))
        yield Rows("gram", _gram_rows(list(scopes), languages, grams_SLL, noise.cosine_RSM, noise.valid_RSM))
        counts = torch.bincount(language_N, minlength=len(languages)).tolist()
        yield Rows("directions", _direction_rows(used, languages, directions_LD, method, counts))

        found = count_conflicts(grams_SLL[0])
        stats = {
            "conflicting_language_pairs": float(found),
            "language_pairs": float(len(languages) * (len(languages) - 1) // 2),
            "conflicts_p_value": flips.tail([found])[0],
            "common_answer_pairs": float(common),
            "largest_group": float(0 if group_N is None else torch.bincount(group_N).max()),
            **_correlations(frame, scores, config.score),
        }
        yield Account(tally("pair", frame["language"].to_list(), []), stats=stats)


def _of_products(ctx: Context) -> Iterator[Rows | Account]:
    """The same for gradients that were never stored; nothing is known of what noise alone would do."""
    config = ctx.config.conflict
    store = ProductStore.open(ctx)
    method = surgery_of(ctx, len(store.languages))
    for note in _notes(store.languages, store.language_N, None):
        ctx.progress.note(note)
    group_N = leaving_together(store.frame, "answers")
    assert group_N is not None
    if shared := int((torch.bincount(group_N)[group_N] > 1).sum()):
        ctx.progress.note(
            f"{shared} of {len(group_N)} pairs share an answer with others, which stay in the "
            "directions they are compared with: one-sided sketches cannot take them out (conflict.leave_out: pair)"
        )
    blocks: dict[str, Columns] = {n: as_slice(c) for n, c in store.layout.group_columns("block").items()}
    scopes: dict[str, Columns] = {"model": slice(None), **blocks}
    grams_SLL = grams(store.directions_LD, list(scopes.values()))
    scores = score_products(
        store.chunks(),
        store.language_N,
        store.omega_N,
        grams_SLL[1:] if config.scope == "layer" else grams_SLL[:1],
        method,
        count_L=store.count_L,
        refit=config.refit,
        min_pairs=MIN_PAIRS,
    )
    for rows in score_rows(store.frame, store.languages, scores, store.weight_N, config.score == "others"):
        yield Rows("scores", rows)
    unknown_RSL = torch.zeros(1, *grams_SLL.shape[:2])
    yield Rows("gram", _gram_rows(list(scopes), store.languages, grams_SLL, unknown_RSL, unknown_RSL.bool()))
    used: dict[str, Columns] = blocks if config.scope == "layer" else {"model": slice(None)}
    counts = store.count_L.tolist()
    yield Rows("directions", _direction_rows(used, store.languages, store.directions_LD, method, counts))
    count = len(store.languages)
    stats = {
        "conflicting_language_pairs": float(count_conflicts(grams_SLL[0])),
        "language_pairs": float(count * (count - 1) // 2),
        **_correlations(store.frame, scores, config.score),
    }
    yield Account(tally("pair", store.frame["language"].to_list(), []), stats=stats)


def _notes(languages: Sequence[str], language_N: Tensor, group_N: Tensor | None, common: int = 0) -> list[str]:
    notes = []
    counts = dict(zip(languages, torch.bincount(language_N, minlength=len(languages)).tolist(), strict=True))
    few = [f"{language} {count}" for language, count in counts.items() if count < MIN_PAIRS]
    if few:
        notes.append(f"fewer than {MIN_PAIRS} pairs ({', '.join(few)}): these languages' directions are mostly noise")
    if len(languages) == 1:
        notes.append(f"one language only ({languages[0]}): pairs are scored against their own language's direction")
    if group_N is not None and (largest := int(torch.bincount(group_N).max())) > 0.2 * len(group_N):
        notes.append(
            f"{largest} of {len(group_N)} pairs hang together by translations and shared answers and leave together"
        )
    if common:
        notes.append(
            f"{common} of {len(language_N)} pairs have an answer so common that it does not leave the directions with them"
        )
    return notes


def _gram_rows(
    scopes: Sequence[str], languages: Sequence[str], grams_SLL: Tensor, noise_RSL: Tensor, valid_RSL: Tensor
) -> pa.Table:
    """noise_RSL: cosines between random halves of the same language: negative ones are sampling noise."""
    cosine_SLL, ok_SLL = cosines(grams_SLL)
    negative_SL = ((noise_RSL < 0) & valid_RSL).sum(dim=0) / valid_RSL.sum(dim=0)  # NaN where nothing compares
    rows = [
        {
            "scope": scope,
            "language": one,
            "other": two,
            "dot": float(grams_SLL[s, i, j]),
            "cosine": float(cosine_SLL[s, i, j]) if ok_SLL[s, i, j] else None,
            "null_negative_rate": _finite(float((negative_SL[s, i] + negative_SL[s, j]) / 2)),
        }
        for s, scope in enumerate(scopes)
        for i, one in enumerate(languages)
        for j, two in enumerate(languages)
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["gram"].schema)


def _direction_rows(
    scopes: dict[str, Columns], languages: Sequence[str], directions_LD: Tensor, method: Surgery, counts: Sequence[int]
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


def _correlations(frame: pl.DataFrame, scores: Scores, used: Literal["all", "others"]) -> dict[str, float]:
    """Pearson correlation of the score with what it should not be about: length and gradient norm."""
    value_N, valid_N = scores.used(used == "others")
    values = pl.Series(value_N.numpy()).set(pl.Series(~valid_N.numpy()), None)
    table = frame.select(
        length=(pl.col("n_chosen") + pl.col("n_rejected")).cast(pl.Float64),
        length_difference=(pl.col("n_chosen") - pl.col("n_rejected")).cast(pl.Float64),
        norm=pl.col("norm").cast(pl.Float64),
    ).with_columns(score=values)
    found = {}
    for name in ("length", "length_difference", "norm"):
        value = _finite(table.select(pl.corr("score", name)).item())
        if value is not None:
            found[f"correlation_with_{name}"] = value
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
