"""Objectives of a sequence: which curated pairs each trains on, which dev pairs it is judged by. docs/methods.md section 6."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import torch
from transformers import PreTrainedModel

from schemas.config.training import Objective
from schemas.errors import UserError
from schemas.ids import content_id, seed_for
from stages.conditions import collected, fitting
from stages.contract import Context, Drop
from stages.evaluate.loglik import preference
from stages.gradients.rows import Pair
from stages.text.render import Renderer, RenderError
from stages.train.dataset import TrainingPairs
from stages.train.scoring import Scorer
from stages.train.session import Session

NO_OBJECTIVE = "no_objective"
_TEXTS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Chosen:
    """An objective with its pairs. dev: token ids of its dev pairs, possibly none."""

    name: str
    pairs: TrainingPairs
    dev: list[Pair]

    @property
    def digest(self) -> str:
        """Of the dev pairs' token ids, which decide a searched rank."""
        return content_id([(pair.prompt, pair.chosen, pair.rejected) for pair in self.dev])


def choose(session: Session, pairs: TrainingPairs) -> tuple[list[Chosen], list[Drop]]:
    """The objectives of `train.orthalign` with their pairs; curated pairs that belong to none are dropped.

    A pair that fits several conditions trains in each. Raises UserError, naming the objective, for a condition that cannot be
    evaluated or that no curated pair fits, and for one without dev pairs when its rank is searched by them.
    """
    ctx = session.ctx
    curated = ctx.scan("curated").select("pair_id", "language").collect().with_row_index("row")
    train = ctx.scan("pairs").filter(pl.col("split") == "train")
    dev = ctx.scan("pairs:0").filter(pl.col("split") == "dev")  # held out in round 0, the same in every round
    chosen, used = [], set[int]()
    for number, objective in enumerate(ctx.config.train.orthalign.objectives):
        where = f"train.orthalign.objectives.{number}.where"
        fitting = _matching(train, objective, where, "pair_id")
        rows = curated.join(fitting, on="pair_id", how="semi", maintain_order="left")["row"].to_list()
        if not rows:
            raise UserError(
                f"no curated pair fits objective {objective.name}: {objective.where}",
                where=where,
                fix="`inspect RUN pairs --where` shows what a condition finds.",
            )
        used.update(rows)
        sampled = _sample(ctx, _matching(dev, objective, where, "pair_id", "language", *_TEXTS))
        held_out = _ids(sampled.select(_TEXTS), session.renderer, ctx.config.text.max_length)
        if not held_out and ctx.config.train.orthalign.rank == "search":
            raise UserError(
                f"objective {objective.name} has no dev pairs to search its rank by",
                where="train.orthalign.rank: search",
                fix="Use rank: energy, or raise pairs.dev_fraction or prompts.dev_fraction.",
            )
        if not held_out:
            ctx.progress.note(
                f"objective {objective.name} has no dev pairs: what later objectives do to it is not measured"
            )
        chosen.append(Chosen(objective.name, pairs.take(rows), held_out))
    drops = [
        Drop("pair", pair_id, language, NO_OBJECTIVE, "fits no condition of train.orthalign.objectives")
        for row, pair_id, language in curated.iter_rows()
        if row not in used
    ]
    return chosen, drops


def _matching(frame: pl.LazyFrame, objective: Objective, where: str, *columns: str) -> pl.DataFrame:
    return collected(fitting(frame, objective.where, where).select(columns), where)


def _sample(ctx: Context, rows: pl.DataFrame) -> pl.DataFrame:
    """At most `dev_pairs` of each language, by a hash order that is the same in every round."""
    keys = [seed_for(ctx.config.seed, "objective", pair_id) for pair_id in rows["pair_id"]]
    ordered = rows.with_columns(pl.Series("key", keys, pl.UInt64)).sort("language", "key", "pair_id")
    return ordered.filter(pl.int_range(pl.len()).over("language") < ctx.config.train.orthalign.dev_pairs)


def _ids(rows: pl.DataFrame, renderer: Renderer, longest: int) -> list[Pair]:
    """Token ids of dev pairs; those that cannot be rendered or are too long are left to the evaluate stage's account."""
    found = []
    for prompt, chosen, rejected in rows.iter_rows():
        try:
            ids = renderer.pair_ids(prompt, chosen, rejected)
        except RenderError:
            continue
        pair = Pair(tuple(ids.prompt), tuple(ids.chosen), tuple(ids.rejected))
        if pair.longest <= longest:
            found.append(pair)
    return found


Scores = list[tuple[torch.Tensor, torch.Tensor]]
"""Token log-probabilities of both sides of each pair."""


def score(model: PreTrainedModel, pairs: Sequence[Pair], scorer: Scorer) -> Scores:
    """Under `model`. Raises Stopped when the run was asked to stop."""
    rows = (row for pair in pairs for row in pair.rows)
    values = list(scorer.stream(model, rows, 2 * len(pairs), "dev answer"))
    return list(zip(values[0::2], values[1::2], strict=True))


def accuracies(now: Scores, start: Scores) -> dict[str, float]:
    """accuracy: share of pairs with the higher mean log-probability on chosen. reward_accuracy: the same of the sums less
    those under the model the round started from. A tie is one half; nothing for no pairs. docs/methods.md section 9."""
    if not now:
        return {}
    means = [preference(float(w.double().mean()), float(r.double().mean())) for w, r in now]
    gains = [
        preference(float((w.double() - w0.double()).sum()), float((r.double() - r0.double()).sum()))
        for (w, r), (w0, r0) in zip(now, start, strict=True)
    ]
    return {"accuracy": sum(means) / len(means), "reward_accuracy": sum(gains) / len(gains)}
