"""Known errors of the data (`label_error`): how many were found, and where they stood in the ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from schemas.manifests import StageManifest
from stages.compare.known_errors import DECILES, KnownErrors, known_errors
from stages.report.charts import Series, histogram
from stages.report.data import Tables
from stages.report.text import percent


@dataclass(frozen=True)
class Errors:
    """One round. kinds: each kind's figures and its chart over the tenths of the ranking."""

    round: int
    kinds: list[tuple[KnownErrors, Markup]]


def errors(tables: Tables, round_: int, manifests: Sequence[StageManifest]) -> Errors | None:
    """None where nothing was selected, or the data says nothing of errors."""
    if not tables.has("curated", round_):
        return None
    stats = next((m.stats for m in manifests if m.round == round_ and _makes_pairs(m)), {})
    files = [tables.inputs.get(f"{name}:{round_}", []) for name in ("pairs", "curated", "rejected")]
    found = known_errors(files[0], files[1], files[2], stats)
    return Errors(round_, [(one, _chart(one)) for one in found]) if found else None


def _makes_pairs(manifest: StageManifest) -> bool:
    return any(file.table == "pairs" for file in manifest.files)


def _chart(one: KnownErrors) -> Markup:
    edges = [n / DECILES for n in range(DECILES + 1)]
    label = (
        f"Where the pairs with the known error {one.kind} stand in their language's ranking, the best on the left: "
        + (", ".join(str(count) for count in one.deciles))
    )
    return histogram(edges, [Series(one.kind, "dropped0", one.deciles)], label, x_format=percent)
