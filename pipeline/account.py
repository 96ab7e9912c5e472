"""Tallies for people: totals over languages, and one line for a stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from schemas.manifests import StageManifest, Tally


def totals(tallies: Sequence[Tally]) -> list[dict[str, Any]]:
    """One entry a unit, in the order the units first appear: in, kept, dropped by reason, failed."""
    rows = []
    for unit in dict.fromkeys(t.unit for t in tallies):
        group = [t for t in tallies if t.unit == unit]
        dropped: Counter[str] = Counter()
        for t in group:
            dropped.update(t.dropped)
        rows.append(
            {
                "unit": unit,
                "in": sum(t.rows_in for t in group),
                "kept": sum(t.kept for t in group),
                "dropped": dict(dropped.most_common()),
                "failed": sum(t.failed for t in group),
            }
        )
    return rows


def account_line(manifest: StageManifest) -> str:
    """`78 prompts in, 70 kept, 8 dropped (tie 5, identical 3) in 12 s`."""
    pieces = []
    for row in totals(manifest.tallies):
        text = f"{row['in']:,} {row['unit']}s in, {row['kept']:,} kept"
        if row["dropped"]:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in row["dropped"].items())
            text += f", {sum(row['dropped'].values()):,} dropped ({reasons})"
        if row["failed"]:
            text += f", {row['failed']:,} failed"
        pieces.append(text)
    return f"{'; '.join(pieces) or 'done'} in {manifest.seconds:.0f} s"
