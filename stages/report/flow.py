"""What entered each stage, what stayed and why the rest left: from the manifests, which account for every row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from schemas.manifests import StageManifest, Tally, merge_tallies
from schemas.reasons import explained
from stages.catalog import STAGES
from stages.report.charts import Series, share_bar
from stages.report.text import spaced
from stages.text.codes import in_order

ORDER = [spec.name for spec in STAGES]


@dataclass(frozen=True)
class Flow:
    """One unit through one stage, over all languages or in one. reasons: (words, rows, what it means), largest first."""

    stage: str
    round: int
    unit: str
    language: str
    rows_in: int
    kept: int
    failed: int
    reasons: list[tuple[str, int, str]]
    bar: Markup

    @property
    def dropped(self) -> int:
        """Rows that a rule removed."""
        return sum(n for _, n, _ in self.reasons)


@dataclass(frozen=True)
class RoundFlow:
    """All stages of a round: totals, and a grid of languages by (stage, unit)."""

    round: int
    totals: list[Flow]
    languages: list[str]
    grid: dict[tuple[str, str, str], Flow]

    def cell(self, language: str, total: Flow) -> Flow | None:
        """One language's part of a total."""
        return self.grid.get((total.stage, total.unit, language))

    @property
    def rows(self) -> list[Flow]:
        """Every language of every stage, for the table."""
        return [flow for total in self.totals for language in self.languages if (flow := self.cell(language, total))]


def flows(manifests: Iterable[StageManifest], languages: Sequence[str]) -> list[RoundFlow]:
    """Per round; the prompts stage, which all rounds share, is with round 0."""
    rounds: dict[int, list[StageManifest]] = defaultdict(list)
    for manifest in manifests:
        if manifest.tallies:
            rounds[manifest.round].append(manifest)
    return [_round(number, rounds[number], languages) for number in sorted(rounds)]


def _round(number: int, manifests: list[StageManifest], languages: Sequence[str]) -> RoundFlow:
    totals: list[Flow] = []
    grid: dict[tuple[str, str, str], Flow] = {}
    for manifest in sorted(manifests, key=lambda m: ORDER.index(m.stage) if m.stage in ORDER else len(ORDER)):
        by_unit: dict[str, list[Tally]] = defaultdict(list)
        for tally in manifest.tallies:
            by_unit[tally.unit].append(tally)
        for unit, tallies in by_unit.items():
            everything = merge_tallies(t.model_copy(update={"language": "all languages"}) for t in tallies)
            totals.append(_flow(manifest, everything[0]))
            for tally in merge_tallies(tallies):
                grid[manifest.stage, unit, tally.language] = _flow(manifest, tally)
    return RoundFlow(number, totals, in_order(languages, [language for _, _, language in grid]), grid)


def _flow(manifest: StageManifest, tally: Tally) -> Flow:
    reasons = sorted(tally.dropped.items(), key=lambda item: (-item[1], item[0]))
    parts = [Series("kept", "kept", [tally.kept])]
    parts += [Series(f"dropped, {spaced(r)}", f"dropped{i % 3}", [n]) for i, (r, n) in enumerate(reasons)]
    parts.append(Series("failed", "failed", [tally.failed]))
    label = f"{manifest.stage}, {tally.language}: {tally.kept} of {tally.rows_in} {tally.unit}s kept"
    return Flow(
        stage=manifest.stage,
        round=manifest.round,
        unit=tally.unit,
        language=tally.language,
        rows_in=tally.rows_in,
        kept=tally.kept,
        failed=tally.failed,
        reasons=[(spaced(r), n, explained(r)) for r, n in reasons],
        bar=share_bar(parts, label),
    )
