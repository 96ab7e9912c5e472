"""The relevance gate: pairs whose answer is no answer to their prompt leave before the directions are made.

They are not a question of preference, and in number they become the direction (docs/planted.md). What relevance is: `stages.gradients.relevance`; where it is cut:
`stages.gradients.cuts`.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from stages.contract import Context
from stages.gradients.cuts import COLUMNS, all_off_topic, cuts, notes, relevant


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
        questioned = frame["split"] == "train"  # trusted pairs are not
        if "relevant" in frame.columns:
            passes = frame["relevant"]
        elif not ctx.config.gradients.relevance or config.sides == "none":
            passes = pl.repeat(True, frame.height, dtype=pl.Boolean, eager=True)
        else:
            present = set(frame["language"])
            languages = [code for code in ctx.config.languages.seen if code in present]
            found = cuts(frame.filter(questioned).select("language", *COLUMNS), languages, config)
            passes, said = relevant(frame, found) | ~questioned, notes(found)
            stats = {f"relevance_cut/{cut.side}/{cut.language}": cut.value for cut in found if cut.value is not None}
        held = frame.filter(~passes)
        if held.height:
            of = frame.filter(questioned)["language"].value_counts()
            each = held["language"].value_counts(name="held").join(of, on="language").sort("language")
            counts = ", ".join(f"{language} {count} of {all_}" for language, count, all_ in each.rows())
            said.append(
                f"{held.height} of {int(questioned.sum())} pairs are off-topic, in no direction and not kept ({counts}): conflict.relevance"
            )
        if held.height == int(questioned.sum()):
            raise all_off_topic()
        return cls(passes, held, said, {"off_topic_pairs": float(held.height), **stats})
