"""The committed parts of a stage and what they add up to: adding one costs its languages, however many there are."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from schemas.manifests import FileRecord, PartManifest, Tally


class Parts:
    """files: of every part, by its index, as they were added. seconds, stats: summed. Keeps no tally of a part by itself: hundreds of
    thousands of them in a hundred languages would not fit."""

    def __init__(self, parts: Iterable[PartManifest] = ()) -> None:
        self.files: dict[int, list[FileRecord]] = {}
        self.seconds = 0.0
        self.stats: dict[str, float] = {}
        self.failed_of: dict[int, list[tuple[str, int, int]]] = {}
        """Of the parts in which rows failed: (unit, failed, rows in)."""
        self._counts: dict[tuple[str, str], list[int]] = {}
        """Of a unit and language: parts, rows in, kept, failed."""
        self._dropped: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for part in parts:
            self.add(part)

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, index: object) -> bool:
        return index in self.files

    def add(self, part: PartManifest) -> None:
        """Count a part. Raises ValueError for one that is counted already."""
        if part.index in self.files:
            raise ValueError(f"part {part.index} is counted already")
        self.files[part.index] = part.files
        if self._count(part, 1):
            self.failed_of[part.index] = failed_rows(part.tallies)

    def remove(self, part: PartManifest) -> None:
        """Count a part no longer."""
        del self.files[part.index]
        self.failed_of.pop(part.index, None)
        self._count(part, -1)

    def failed(self) -> list[tuple[str, int, int]]:
        """(unit, failed, rows in) of every unit of which rows failed."""
        units: dict[str, list[int]] = {}
        for (unit, _), (_, rows_in, _, failed) in self._counts.items():
            total = units.setdefault(unit, [0, 0])
            total[0] += failed
            total[1] += rows_in
        return [(unit, failed, rows_in) for unit, (failed, rows_in) in units.items() if failed]

    def tallies(self) -> list[Tally]:
        """Of all parts together, by (unit, language), in sorted order."""
        return [
            Tally(
                unit=unit,
                language=language,
                rows_in=rows_in,
                kept=kept,
                dropped=dict(sorted((+self._dropped[unit, language]).items())),
                failed=failed,
            )
            for (unit, language), (parts, rows_in, kept, failed) in sorted(self._counts.items())
            if parts
        ]

    def _count(self, part: PartManifest, sign: int) -> bool:
        """Whether rows of it failed."""
        self.seconds += sign * part.seconds
        for name, value in part.stats.items():
            self.stats[name] = self.stats.get(name, 0.0) + sign * value
        any_failed = False
        for tally in part.tallies:
            key = tally.unit, tally.language
            counts = self._counts.get(key)
            if counts is None:
                counts = self._counts[key] = [0, 0, 0, 0]
            counts[0] += sign
            counts[1] += sign * tally.rows_in
            counts[2] += sign * tally.kept
            if tally.failed:
                counts[3] += sign * tally.failed
                any_failed = True
            if tally.dropped:
                dropped = self._dropped[key]
                for reason, rows in tally.dropped.items():
                    dropped[reason] += sign * rows
        return any_failed


def failed_rows(tallies: Iterable[Tally]) -> list[tuple[str, int, int]]:
    """(unit, failed, rows in) of every unit of which rows failed."""
    failed: Counter[str] = Counter()
    rows_in: Counter[str] = Counter()
    for tally in tallies:
        failed[tally.unit] += tally.failed
        rows_in[tally.unit] += tally.rows_in
    return [(unit, count, rows_in[unit]) for unit, count in failed.items() if count]
