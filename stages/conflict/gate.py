"""The relevance gate: pairs whose answer is no answer to their prompt leave before the directions are made.

They are not a question of preference, and in number they become the direction (docs/planted.md). What relevance is and where it is cut:
`stages.gradients.relevance`.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from schemas.errors import UserError
from stages.contract import Context
from stages.gradients.relevance import COLUMNS, cuts, notes, relevant

OFF_TOPIC = "off_topic"
"""The flag in scores, and the reason in rejected."""


@dataclass(frozen=True)
class Gate:
    """passes [M]: of all pairs with a gradient; held: the rows of those that do not; notes: for people; stats: the cuts."""

    passes: pl.Series
    held: pl.DataFrame
    notes: list[str]
    stats: dict[str, float]

    @classmethod
    def of(cls, ctx: Context, frame: pl.DataFrame) -> Gate:
        """frame: language and the relevance columns; with `relevant`, the gate was in the first pass of one-sided sketches. Raises UserError
        where nothing passes."""
        config = ctx.config.conflict.relevance
        said: list[str] = []
        stats: dict[str, float] = {}
        if "relevant" in frame.columns:
            passes = frame["relevant"]
        elif not ctx.config.gradients.relevance or config.sides == "none":
            passes = pl.repeat(True, frame.height, dtype=pl.Boolean, eager=True)
        else:
            present = set(frame["language"])
            languages = [code for code in ctx.config.languages.seen if code in present]
            found = cuts(
                frame.filter(pl.col("null_chosen").is_not_null()).select("language", *COLUMNS), languages, config
            )
            # trusted pairs are not questioned
            passes, said = relevant(frame, found) | (frame["split"] != "train"), notes(found)
            stats = {f"relevance_cut/{cut.side}/{cut.language}": cut.value for cut in found if cut.value is not None}
        held = frame.filter(~passes)
        if held.height:
            each = held.group_by("language").len().sort("language").rows()
            counts = ", ".join(f"{language} {count}" for language, count in each)
            said.append(
                f"{held.height} of {frame.height} pairs are off-topic, in no direction and not kept ({counts}): conflict.relevance"
            )
        if held.height == frame.height:
            raise UserError(
                "Every pair is off-topic: no answer is likelier under its prompt than answers to other prompts are",
                where="conflict.relevance",
                fix="Look at the pairs, or let all pass: conflict.relevance.sides: none.",
            )
        return cls(passes, held, said, {"off_topic_pairs": float(held.height), **stats})
