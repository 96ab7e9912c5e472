"""Conflict: language directions, gradient surgery over them, and a score for every pair (METHODS.md section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from schemas.errors import UserError
from schemas.ids import seed_for
from schemas.tables import TABLES
from stages.conflict.directions import (
    Chunks,
    cosines,
    directions,
    ema_omegas,
    grams,
    loss_weights,
    mean_omegas,
    scaled,
)
from stages.conflict.directions import conflicts as count_conflicts
from stages.conflict.groups import merge_groups, plan_passes
from stages.conflict.metric import Metric, fit_metric
from stages.conflict.null import sign_flip_null, split_half_null
from stages.conflict.scores import Scores, score_pairs
from stages.conflict.surgery import Surgery, surgery
from stages.conflict.table import margin, score_rows
from stages.contract import Account, Context, Rows, tally
from stages.gradients.projections import SketchLayout
from stages.gradients.stage import LAYOUT_KEY, SEED_KEY
from stages.gradients.store import unpack_sketches

MIN_PAIRS = 20
"""A language with fewer pairs is flagged: its direction is mostly noise."""
_CHUNK_ROWS = 1024
_COMMON_ANSWER = (20, 0.01)
"""An answer shared by more pairs than both (a number, a share of all) does not join them into one group: "Yes." would
chain unrelated tasks together until nothing is left to compare with."""


class Conflict:
    """gradients, pairs -> scores, gram, directions. Unit `pair`: every pair with a gradient gets a row."""

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """See TableStage.run. Raises UserError for sketches that cannot be compared, or an unknown surgery."""
        config = ctx.config.conflict
        store = _Store.open(ctx)
        languages = [code for code in ctx.config.languages.seen if code in set(store.frame["language"])]
        index = {code: n for n, code in enumerate(languages)}
        language_N = torch.tensor([index[code] for code in store.frame["language"]], dtype=torch.int64)
        weight_N = _loss_weights(ctx, store.frame)
        group_N = _groups(store.frame) if config.leave_out == "group" else None
        blocks = store.layout.group_columns("block")
        surgery_columns = list(blocks.values()) if config.scope == "layer" else [slice(None)]
        method = _method(ctx, len(languages))
        for note in _notes(languages, language_N, group_N):
            ctx.progress.note(note)

        passes = 4 + (config.metric in ("coordinate", "layer"))
        passes += max(1, len(plan_passes([] if group_N is None else group_N.tolist(), 8192)))
        ctx.progress.total(passes * store.frame.height, "sketches")
        chunks = store.chunks(ctx)
        chunks = scaled(_metric(ctx, store.layout, chunks).stream(chunks), weight_N)
        if config.direction == "ema":
            omega_N = ema_omegas(language_N, len(languages), config.ema_gamma, config.ema_batch)
        else:
            omega_N = mean_omegas(language_N, len(languages))
        directions_LD = directions(chunks, language_N, omega_N, len(languages))
        scores = score_pairs(
            chunks,
            language_N,
            omega_N,
            directions_LD,
            method,
            columns=surgery_columns,
            group_N=group_N,
            min_pairs=MIN_PAIRS,
        )
        for rows in score_rows(store.frame, languages, scores, weight_N, config.score == "others"):
            yield Rows("scores", rows)

        scopes: dict[str, Tensor | slice] = {"model": slice(None), **blocks}
        grams_SLL = grams(directions_LD, list(scopes.values()))
        seed = seed_for(ctx.config.seed, ctx.round, "null")
        noise = split_half_null(chunks, language_N, omega_N, len(languages), columns=list(scopes.values()), seed=seed)
        flips = sign_flip_null(chunks, language_N, omega_N, len(languages), seed=seed)
        yield Rows("gram", _gram_rows(list(scopes), languages, grams_SLL, noise.cosine_RSM, noise.valid_RSM))
        used = blocks if config.scope == "layer" else {"model": slice(None)}
        counts = torch.bincount(language_N, minlength=len(languages)).tolist()
        yield Rows("directions", _direction_rows(used, languages, directions_LD, method, counts))

        found = count_conflicts(grams_SLL[0])
        stats = {
            "conflicting_language_pairs": float(found),
            "language_pairs": float(len(languages) * (len(languages) - 1) // 2),
            "conflicts_p_value": flips.tail([found])[0],
            "largest_group": float(0 if group_N is None else torch.bincount(group_N).max()),
            **_correlations(store.frame, scores),
        }
        yield Account(tally("pair", store.frame["language"].to_list(), []), stats=stats)


@dataclass(frozen=True)
class _Store:
    """The gradients table: scalars in memory, sketches as a stream."""

    files: list[Any]
    layout: SketchLayout
    frame: pl.DataFrame

    @classmethod
    def open(cls, ctx: Context) -> _Store:
        """Raises UserError if parts were sketched differently, or there is nothing."""
        files = ctx.inputs["gradients"]
        found = {
            tuple((pq.read_schema(file).metadata or {}).get(key) for key in (LAYOUT_KEY, SEED_KEY)) for file in files
        }
        if len(found) != 1 or None in next(iter(found)):
            raise UserError(
                "These gradient sketches were made with different layers or projections and cannot be compared",
                where=str(files[0].parent),
                fix="Redo them: --force-stage gradients.",
            )
        ((layout, _),) = found
        scalars = ctx.scan("gradients").drop("sketch")
        answers = ctx.scan("pairs").select(
            "pair_id",
            *(pl.col(side).list.last().struct.field("content").hash().alias(side) for side in ("chosen", "rejected")),
        )
        frame = scalars.join(answers, on="pair_id", how="left", maintain_order="left").collect()
        if frame.is_empty():
            raise UserError(
                "No pair has a gradient", fix="See what was dropped: python -m pipeline inspect RUN dropped/gradients."
            )
        return cls(files, SketchLayout.from_json((layout or b"").decode()), frame)

    def chunks(self, ctx: Context) -> Chunks:
        """A stream over all sketches [n, D] float32, in the frame's order."""

        def generate() -> Iterator[Tensor]:
            for file in self.files:
                for batch in pq.ParquetFile(file).iter_batches(_CHUNK_ROWS, columns=["sketch", "norm"]):
                    flat = batch.column("sketch").flatten().to_numpy(zero_copy_only=False)
                    stored_ND = torch.from_numpy(flat.astype(np.float32)).view(batch.num_rows, -1)
                    norm_N = torch.from_numpy(batch.column("norm").to_numpy(zero_copy_only=False).copy())
                    ctx.progress.advance(batch.num_rows)
                    yield unpack_sketches(stored_ND, norm_N)

        return generate


def _loss_weights(ctx: Context, frame: pl.DataFrame) -> Tensor:
    """c_i of the run's loss, or ones."""
    if ctx.config.conflict.weighting == "none":
        return torch.ones(frame.height, dtype=torch.float64)
    delta = frame.select(margin()).to_series()
    n_chosen, n_rejected = (torch.from_numpy(frame[name].to_numpy().copy()) for name in ("n_chosen", "n_rejected"))
    loss = ctx.config.loss
    return loss_weights(torch.from_numpy(delta.to_numpy().copy()), n_chosen, n_rejected, loss.beta, loss.alpha)


def _groups(frame: pl.DataFrame) -> Tensor:
    """Pairs that share a translation group or an answer text (chosen of one, rejected of another) leave together."""
    n = frame.height
    texts = [*frame["chosen"].to_list(), *frame["rejected"].to_list()]
    limit = max(_COMMON_ANSWER[0], int(_COMMON_ANSWER[1] * n))
    values, counts = np.unique(np.array(texts, dtype=np.uint64), return_counts=True)
    common = set(values[counts > limit].tolist())
    answers = [None if text in common else text for text in texts]
    translations = frame["group_id"].to_list() * 2
    return merge_groups([*range(n)] * 2, answers, translations)[:n]


def _method(ctx: Context, n_languages: int) -> Surgery:
    config = ctx.config.conflict
    try:
        return surgery(config.surgery, n_languages, seed_for(ctx.config.seed, ctx.round, "surgery"), config.orders)
    except (ValueError, ImportError) as error:
        raise UserError(str(error), where="conflict.surgery") from error


def _metric(ctx: Context, layout: SketchLayout, chunks: Chunks) -> Metric:
    config = ctx.config.conflict
    kind = "none" if config.metric == "raw" else config.metric
    return fit_metric(chunks, kind, q=config.metric_power, layers=[slot.columns for slot in layout.layers])


def _notes(languages: Sequence[str], language_N: Tensor, group_N: Tensor | None) -> list[str]:
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
    scopes: dict[str, Any], languages: Sequence[str], directions_LD: Tensor, method: Surgery, counts: Sequence[int]
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


def _correlations(frame: pl.DataFrame, scores: Scores) -> dict[str, float]:
    """Pearson correlation of the score with what it should not be about: length and gradient norm."""
    values = pl.Series(scores.optional("score_all"), dtype=pl.Float64)
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
