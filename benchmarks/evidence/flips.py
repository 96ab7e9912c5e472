"""What studies of flipped labels on stored sketches share: a row a share of flips and seed, in it a figure for every count."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from benchmarks.evidence.answers import Pool
from benchmarks.evidence.real import layout_of
from benchmarks.planted import sketches
from benchmarks.planted.damage import Damage
from benchmarks.planted.scoring import configured
from benchmarks.planted.sketches import Sketches
from benchmarks.quality.results import Cell, Results, Values
from schemas.ids import content_id
from stages.gradients.projections import SketchLayout


@dataclass(frozen=True)
class FlipStudy(ABC):
    """questions: of the sketched ones the first so many. version: raised when a change of code changes figures."""

    sketched: Path
    model: str
    pool: Pool
    questions: int
    table: ClassVar[str]
    version: ClassVar[int]
    shares: ClassVar[tuple[float, ...]]
    counts: ClassVar[tuple[int, ...]]

    @abstractmethod
    def measure(self, found: Mapping[str, Sketches], damage: Damage, layout: SketchLayout) -> Values:
        """auroc/NAME and left/NAME, a name for every count. found: by contrast, the questions in the pool's languages."""

    def cell(self, share: float, seed: int) -> Cell:
        """A row: every count, with labels flipped by one seed."""
        facts = {name: value for name, value in asdict(self).items() if name != "sketched"}
        identity = content_id(self.version, facts, self.shares, self.counts, asdict(configured()))
        return Cell(self.table, f"{self.model.rpartition(':')[2]}, flip {share:.0%}", seed, identity)

    def fill(self, results: Results, seeds: int, say: Callable[[str], None]) -> None:
        """Write the rows that are missing."""
        wanted = [(self.cell(share, seed), share) for seed in range(seeds) for share in self.shares]
        wanted = [(cell, share) for cell, share in wanted if results.read(cell) is None]
        if not wanted:
            return
        found = {
            name: part.of(self.pool.languages, self.questions)
            for name, part in sketches.read(self.sketched, ("real", "easy")).items()
        }
        layout = layout_of(self.sketched)
        for cell, share in wanted:
            begun = time.monotonic()
            values = self.measure(found, Damage("real", "flip", share, cell.seed), layout)
            results.write(cell, values, time.monotonic() - begun)
            shown = ", ".join(format(values[f"auroc/{count}"], ".2f") for count in self.counts)
            say(f"{cell.method}, seed {cell.seed}: {shown}")
