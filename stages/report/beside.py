"""The run's selection beside others on the same pairs: `stages.compare` worked it out, here it becomes rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stages.compare.figures import MEASURES, Comparison, Example
from stages.report.text import Clipped, clip, count, number, percent, spaced


@dataclass(frozen=True)
class Only:
    """Pairs that one selection alone keeps: how many, and some of them with (language, prompt, chosen, rejected)."""

    name: str
    total: int
    pairs: list[tuple[str, Clipped, Clipped, Clipped]]


@dataclass(frozen=True)
class Beside:
    """One round. head: names of the columns; rows: (what, its values); refusal: why there is nothing to show, else empty."""

    round: int
    pool: int
    training: int
    head: list[str]
    rows: list[tuple[str, list[str]]]
    only: list[Only]
    refusal: str = ""


def beside(found: Mapping[int, Comparison | str]) -> list[Beside]:
    """By round, what was compared, or why nothing could be."""
    return [
        Beside(round_, 0, 0, [], [], [], one) if isinstance(one, str) else _beside(round_, one)
        for round_, one in sorted(found.items())
    ]


def _beside(round_: int, found: Comparison) -> Beside:
    arms = found.arms
    rows = [("pairs kept", [count(found.pool), *(count(arm.kept) for arm in arms)])]
    for language, pairs in found.languages.items():
        rows.append((f"of them {language}", [count(pairs), *(count(arm.languages[language]) for arm in arms)]))
    for kind, errors in found.errors.items():
        rows.append(
            (f"with the known error {spaced(kind)}", [count(errors), *(count(arm.errors[kind]) for arm in arms)])
        )
    for measure in MEASURES:
        if measure.name in found.means:
            means = [found.means, *(arm.means for arm in arms)]
            rows.append((f"mean {measure.meaning}", [number(mean.get(measure.name)) for mean in means]))
    for other in arms if len(arms) > 1 else ():
        shares = ["" if arm.name == other.name else percent(arm.overlap[other.name]) for arm in arms]
        rows.append((f"also kept by {other.name}", ["", *shares]))
    if len(arms) > 1:
        rows.append(("kept by no other", ["", *(count(arm.only) for arm in arms)]))
    only = [Only(arm.name, arm.only, [_texts(pair) for pair in arm.examples]) for arm in arms if arm.examples]
    return Beside(round_, found.pool, found.training, ["pool", *(arm.name for arm in arms)], rows, only)


def _texts(pair: Example) -> tuple[str, Clipped, Clipped, Clipped]:
    return pair.language, clip(pair.prompt), clip(pair.chosen), clip(pair.rejected)
