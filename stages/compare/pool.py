"""One pool for all selections that are compared: the pairs that every one of them can rank.

On it each keeps its share by the rule of the select stage, so selections with the same share and quota keep equally many, and differ only in which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import Context, Silent
from stages.select.stage import rank, read_pairs, valued


@dataclass(frozen=True)
class Arm:
    """One of the selections. config: the run's, with the arm's settings; inputs: the tables that select reads, its scores among them; settings:
    what it differs in, as `key=value`."""

    name: str
    config: RunConfig
    inputs: Mapping[str, list[Path]]
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pool:
    """pairs: pair_id and language of the pool, in table order; row by row, kept: whether each arm keeps it, places: where it ranks it, from 1.

    training: training pairs there are; unranked: how many of them each arm cannot rank.
    """

    pairs: pl.DataFrame
    kept: dict[str, pl.Series]
    places: dict[str, pl.Series]
    training: int
    unranked: dict[str, int]


def on_one_pool(arms: Sequence[Arm], round_: int) -> Pool:
    """What every arm keeps of the pool.

    Raises UserError, naming the arm, where one can rank no pair, and where no pair is ranked by all.
    """
    frames = [read_pairs(Context(arm.config, round_, arm.inputs, {}, Silent())) for arm in arms]
    seeds = [(arm.config.selection_seed, round_) for arm in arms]
    everywhere, unranked = pl.Series([True] * frames[0].height, dtype=pl.Boolean), {}
    for arm, frame, seed in zip(arms, frames, seeds, strict=True):
        ranked = values_of(arm, frame, seed)["used"].is_not_null()
        everywhere, unranked[arm.name] = everywhere & ranked, int((~ranked).sum())
    if not everywhere.any():
        raise UserError(
            f"No pair can be ranked by all of {', '.join(arm.name for arm in arms)}", fix="Compare fewer at once."
        )
    kept, places = {}, {}
    for arm, frame, seed in zip(arms, frames, seeds, strict=True):
        values = values_of(arm, frame.filter(everywhere), seed)  # a value may depend on the other pairs: mid_band
        kept[arm.name] = rank(values, arm.config.select)["reason"].is_null()
        places[arm.name] = _places(values)
    pairs = frames[0].filter(everywhere).select("pair_id", "language")
    return Pool(pairs, kept, places, frames[0].height, unranked)


def values_of(arm: Arm, frame: pl.DataFrame, seed: Sequence[object]) -> pl.DataFrame:
    """What the arm ranks these pairs by (`valued`). Raises UserError, naming the arm, where it can rank none."""
    try:
        return valued(frame, arm.config.select.by, seed)
    except UserError as error:
        raise UserError(f"{arm.name}: {error.what}", where=error.where, fix=error.fix) from error


def _places(values: pl.DataFrame) -> pl.Series:
    """1 for the pair that is kept first; ties go by pair id, as in `rank`."""
    order = values.with_row_index("row").sort("used", "pair_id", descending=[True, False])
    return order.with_columns(place=pl.int_range(1, pl.len() + 1)).sort("row")["place"]


def why_not(arm: Arm, round_: int) -> str:
    """Why the arm can rank no pair; empty if it can."""
    try:
        values_of(
            arm, read_pairs(Context(arm.config, round_, arm.inputs, {}, Silent())), (arm.config.selection_seed, round_)
        )
    except UserError as error:
        return error.what.removeprefix(f"{arm.name}: ")
    return ""
