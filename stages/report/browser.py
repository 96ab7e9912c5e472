"""Pairs to look at: some kept and some dropped of every language, spread evenly over the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from stages.report.data import Tables
from stages.report.text import Clipped, clip, spaced
from stages.text.codes import in_order

_SCORES = ["pair_id", "cosine_own", "conflicting_languages"]


@dataclass(frozen=True)
class Shown:
    """A pair as it is displayed. prompt: (role, text) per message; reason: None when kept."""

    pair_id: str
    language: str
    prompt: list[tuple[str, Clipped]]
    chosen: Clipped
    rejected: Clipped
    chosen_score: float | None
    rejected_score: float | None
    score: float | None
    cosine_own: float | None
    conflicting: list[str]
    reason: str | None


@dataclass(frozen=True)
class Browser:
    """One round's pairs, best score first; kept_total and dropped_total: how many there are altogether."""

    round: int
    languages: list[str]
    kept: list[Shown]
    dropped: list[Shown]
    kept_total: int
    dropped_total: int


def browser(tables: Tables, round_: int, languages: Sequence[str], limit: int) -> Browser | None:
    """None when select has not run or no pairs are wanted. Only the pairs shown are read with their text."""
    columns = ["pair_id", "language", "conflict_score"]
    frames = {table: tables.read(table, round_, columns) for table in ("curated", "rejected")}
    if limit == 0 or not sum(len(frame) for frame in frames.values()):
        return None
    groups = {
        (table, str(language)): _spread_order(frame.filter(language=language))
        for table, frame in frames.items()
        for language in frame["language"].unique()
    }
    quotas = shares({key: len(ids) for key, ids in groups.items()}, limit)
    picked = {
        table: [i for key, ids in groups.items() if key[0] == table for i in evenly(ids, quotas[key])]
        for table in frames
    }
    details = {
        row["pair_id"]: row
        for row in tables.scan("scores", round_)
        .select(_SCORES)
        .filter(pl.col("pair_id").is_in([i for ids in picked.values() for i in ids]))
        .collect()
        .rows(named=True)
    }
    shown = {table: _read(tables, table, round_, ids, details) for table, ids in picked.items()}
    found = in_order(languages, [pair.language for pairs in shown.values() for pair in pairs])
    return Browser(round_, found, shown["curated"], shown["rejected"], len(frames["curated"]), len(frames["rejected"]))


def shares(available: dict[Any, int], limit: int) -> dict[Any, int]:
    """Split `limit` as evenly as `available` allows: what one key cannot use goes to the others, in sorted order."""
    given = dict.fromkeys(available, 0)
    left = min(limit, sum(available.values()))
    while left:
        open_keys = [key for key in sorted(available) if given[key] < available[key]]
        each = max(1, left // len(open_keys))
        for key in open_keys:
            step = min(each, available[key] - given[key], left)
            given[key] += step
            left -= step
    return given


def evenly(items: Sequence[Any], n: int) -> list[Any]:
    """`n` of the items, evenly spaced, both ends included."""
    if n >= len(items):
        return list(items)
    if n == 1:
        return [items[len(items) // 2]]
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def _spread_order(frame: pl.DataFrame) -> list[str]:
    order = frame.sort("conflict_score", "pair_id", descending=[True, False], nulls_last=True)
    return order["pair_id"].to_list()


def _read(tables: Tables, table: str, round_: int, ids: list[str], details: dict[str, dict]) -> list[Shown]:
    rows = tables.scan(table, round_).filter(pl.col("pair_id").is_in(ids)).collect()
    rows = rows.sort("conflict_score", "pair_id", descending=[True, False], nulls_last=True)
    return [_shown(row, details.get(row["pair_id"], {})) for row in rows.rows(named=True)]


def _shown(row: dict[str, Any], detail: dict[str, Any]) -> Shown:
    return Shown(
        pair_id=row["pair_id"],
        language=row["language"],
        prompt=[(message["role"], clip(message["content"] or "")) for message in row["prompt"]],
        chosen=_answer(row["chosen"]),
        rejected=_answer(row["rejected"]),
        chosen_score=row["chosen_score"],
        rejected_score=row["rejected_score"],
        score=row["conflict_score"],
        cosine_own=detail.get("cosine_own"),
        conflicting=detail.get("conflicting_languages") or [],
        reason=spaced(row["reason"]) if "reason" in row else None,
    )


def _answer(messages: list[dict[str, Any]]) -> Clipped:
    return clip("\n\n".join(message["content"] or "" for message in messages))
