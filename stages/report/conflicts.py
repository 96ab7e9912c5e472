"""Agreement between languages: cosines of their gradient directions, and their weights after surgery."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from schemas.manifests import StageManifest
from schemas.tables import FEW_PAIRS
from stages.report.charts import value_bar
from stages.report.data import Tables
from stages.report.text import fixed
from stages.text.codes import in_order

MANY = 24
"""More languages than this are a map of colours in an order that puts the alike side by side, of the whole model alone."""
_STEPS = 5
_SHOWN = 3


@dataclass(frozen=True)
class Cell:
    """A cosine between two languages beside its null rate. css: its place on the diverging scale, -5 .. 5."""

    cosine: float | None
    null: float | None
    css: str
    diagonal: bool


@dataclass(frozen=True)
class Neighbours:
    """Of one language among many: those whose directions agree least and most with its own, each with the cosine."""

    language: str
    conflicts: int
    least: list[tuple[str, float]]
    most: list[tuple[str, float]]


@dataclass(frozen=True)
class Weight:
    """A language's direction after surgery. few: too few pairs to trust it."""

    language: str
    n_pairs: int
    norm: float
    weight: float
    conflicts: int
    few: bool
    bar: Markup


@dataclass(frozen=True)
class Scope:
    """The whole model, or a layer group.

    limit: the cosine at which colours are strongest; negative: language pairs below 0 of `compared`; expected: how
    many noise alone would put there (split halves of one language). neighbours: of every language, where there are many.
    """

    name: str
    title: str
    languages: list[str]
    limit: float
    cells: list[list[Cell]]
    weights: list[Weight]
    negative: int
    compared: int
    expected: float | None
    mean_cosine: float | None
    lowest: tuple[str, str, float] | None
    neighbours: list[Neighbours]


@dataclass(frozen=True)
class Conflicts:
    """One round's scopes, whole model first; few: languages with too few pairs.

    p_value: probability of at least as many conflicts in the whole model when every pair's sign is random.
    """

    round: int
    scopes: list[Scope]
    few: list[str]
    p_value: float | None


def conflicts(
    tables: Tables, round_: int, languages: Sequence[str], manifests: Iterable[StageManifest] = ()
) -> Conflicts | None:
    """None when neither table was written. Layer groups may lack directions (weights are then the model's)."""
    gram = tables.read("gram", round_, ["scope", "language", "other", "cosine", "null_negative_rate"]).rows(named=True)
    columns = ["scope", "language", "n_pairs", "norm", "weight", "conflicts"]
    directions = tables.read("directions", round_, columns).rows(named=True)
    if not gram and not directions:
        return None
    names = sorted({row["scope"] for row in (*gram, *directions)}, key=_scope_order)
    few = {row["language"] for row in directions if row["n_pairs"] < FEW_PAIRS}
    scopes = [
        _scope(
            name,
            [row for row in gram if row["scope"] == name],
            [row for row in directions if row["scope"] == name],
            languages,
        )
        for name in names
    ]
    stats = next((m.stats for m in manifests if m.stage == "conflict" and m.round == round_), {})
    return Conflicts(round_, scopes, in_order(languages, list(few)), stats.get("conflicts_p_value"))


def _scope(name: str, gram: list[dict], directions: list[dict], languages: Sequence[str]) -> Scope:
    found = in_order(languages, [r["language"] for r in (*gram, *directions)] + [r["other"] for r in gram])
    apart = [abs(r["cosine"]) for r in gram if r["language"] != r["other"] and _is_number(r["cosine"])]
    limit = _round_up(max(apart, default=0.1))
    entries = {(row["language"], row["other"]): row for row in gram}
    many = len(found) > MANY
    shown = _alike_together(found, entries) if many else found
    cells = [[_cell(entries, a, b, limit) for b in shown] for a in shown] if gram else []
    pairs = [
        (a, b, cells[i][j])
        for i, a in enumerate(shown)
        for j, b in enumerate(shown)
        if cells and i < j and cells[i][j].cosine is not None
    ]
    cosines = [cell.cosine for _, _, cell in pairs if cell.cosine is not None]
    nulls = [cell.null for _, _, cell in pairs if cell.null is not None]
    lowest = min(((a, b, c.cosine) for a, b, c in pairs if c.cosine is not None), key=lambda x: x[2], default=None)
    return Scope(
        name=name,
        title="whole model" if name == "model" else name,
        languages=shown,
        limit=limit,
        cells=cells if name == "model" or not many else [],
        weights=_weights(directions, found),
        negative=sum(cosine < 0 for cosine in cosines),
        compared=len(cosines),
        expected=sum(nulls) if nulls and len(nulls) == len(cosines) else None,
        mean_cosine=sum(cosines) / len(cosines) if cosines else None,
        lowest=lowest,
        neighbours=_neighbours(shown, cells) if name == "model" and many else [],
    )


def _alike_together(languages: list[str], entries: dict[tuple[str, str], dict]) -> list[str]:
    """The leaves of the tree that average linkage makes of the cosines, in order: clusters side by side, whichever there are. What has no
    cosine counts as 0. (scipy's linkage is no dependency of the report's.)"""
    alike = np.zeros((len(languages), len(languages)))
    for i, a in enumerate(languages):
        for j, b in enumerate(languages):
            cosine = (entries.get((a, b)) or entries.get((b, a)) or {}).get("cosine")
            alike[i, j] = cosine if _is_number(cosine) else 0.0
    np.fill_diagonal(alike, -np.inf)
    branches = [[language] for language in languages]
    for _ in range(len(languages) - 1):
        i, j = sorted(divmod(int(alike.argmax()), len(languages)))
        sizes = len(branches[i]), len(branches[j])
        alike[i] = (sizes[0] * alike[i] + sizes[1] * alike[j]) / sum(sizes)
        alike[:, i] = alike[i]
        branches[i] += branches[j]
        alike[i, i] = -np.inf
        alike[j], alike[:, j] = -np.inf, -np.inf
    return branches[0]


def _neighbours(languages: list[str], cells: list[list[Cell]]) -> list[Neighbours]:
    found = []
    for language, row in sorted(zip(languages, cells, strict=True)):
        known = [(b, c.cosine) for b, c in zip(languages, row, strict=True) if not c.diagonal and c.cosine is not None]
        known.sort(key=lambda pair: pair[1])
        conflicts = sum(cosine < 0 for _, cosine in known)
        found.append(Neighbours(language, conflicts, known[:_SHOWN], known[: -_SHOWN - 1 : -1]))
    return found


def _cell(entries: dict[tuple[str, str], dict], a: str, b: str, limit: float) -> Cell:
    row = entries.get((a, b)) or entries.get((b, a)) or {}
    cosine = row.get("cosine")
    cosine = cosine if _is_number(cosine) else None
    if a == b or cosine is None:
        return Cell(cosine, None, "none", a == b)
    step = max(-_STEPS, min(_STEPS, round(_STEPS * cosine / limit)))
    if cosine < 0:
        step = min(step, -1)
    null = row.get("null_negative_rate")
    return Cell(cosine, null if _is_number(null) else None, f"n{-step}" if step < 0 else f"p{step}", False)


def _weights(directions: list[dict], order: list[str]) -> list[Weight]:
    high = max([1.0, *(row["weight"] for row in directions)])
    low = min([0.0, *(row["weight"] for row in directions)])
    rows = sorted(directions, key=lambda row: order.index(row["language"]))
    return [
        Weight(
            language=row["language"],
            n_pairs=row["n_pairs"],
            norm=row["norm"],
            weight=row["weight"],
            conflicts=row["conflicts"],
            few=row["n_pairs"] < FEW_PAIRS,
            bar=value_bar(row["weight"], low, high, f"{row['language']}: weight {fixed(row['weight'])}", "kept"),
        )
        for row in rows
    ]


def scale() -> list[str]:
    """CSS classes of the diverging scale, from conflict to agreement."""
    return [f"n{-s}" if s < 0 else f"p{s}" for s in range(-_STEPS, _STEPS + 1)]


def _scope_order(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """The whole model first, then names with their numbers in numeric order."""
    return name != "model", [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _round_up(value: float) -> float:
    """The next of 0.02, 0.05, 0.1, 0.2, 0.5, 1: a scale people can read."""
    return next((limit for limit in (0.02, 0.05, 0.1, 0.2, 0.5) if value <= limit), 1.0)


def _is_number(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
