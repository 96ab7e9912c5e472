"""How many pairs a selection would train on in a run of its own: its share of all that it can rank, whatever others can."""

from __future__ import annotations

import polars as pl

from schemas.errors import UserError
from stages.compare.pool import Arm, values_of
from stages.conditions import collected, fitting
from stages.contract import Context, Silent
from stages.select.stage import rank, read_pairs


def trained_on(arm: Arm, round_: int) -> dict[str, int]:
    """Objective of `train.orthalign` -> pairs it is trained on; of one training without objectives, under no name.

    Raises UserError, naming the arm, where it can rank no pair, and where an objective is left without any.
    """
    ctx = Context(arm.config, round_, arm.inputs, {}, Silent())
    values = values_of(arm, read_pairs(ctx), (arm.config.selection_seed, round_))
    kept = rank(values, arm.config.select).filter(pl.col("reason").is_null())
    objectives = arm.config.train.orthalign.objectives
    if not objectives:
        return {"": kept.height}
    pairs, counts = ctx.scan("pairs").filter(pl.col("split") == "train"), {}
    for number, objective in enumerate(objectives):
        where = f"train.orthalign.objectives.{number}.where"
        fits = collected(fitting(pairs, objective.where, where).select("pair_id"), where)
        counts[objective.name] = kept.join(fits, on="pair_id", how="semi").height
        if not counts[objective.name]:
            raise UserError(
                f"{arm.name}: no pair that it keeps fits objective {objective.name}: {objective.where}",
                where=where,
                fix="Leave the arm out, or let it keep more: select.keep.",
            )
    return counts
