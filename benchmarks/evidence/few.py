"""How few pairs are enough? Flipped labels found in pools of a few questions, and in one language by itself."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.evidence.answers import Pool
from benchmarks.evidence.real import GATED, figures, layout_of
from benchmarks.planted import sketches
from benchmarks.planted.damage import Damage, plant
from benchmarks.planted.scoring import configured
from benchmarks.planted.sketches import Sketches
from benchmarks.quality.results import Cell, Results, Values
from schemas.ids import content_id, seed_for
from stages.gradients.projections import SketchLayout

VERSION = 1
TABLE = "few"
SHARES = (0.2, 0.4)
COUNTS = (5, 10, 20, 40)
"""Pairs a language, of which these shares are whole numbers."""
ALONE = "alone"
"""One language with all its pairs; figures are means over the languages."""


@dataclass(frozen=True)
class Study:
    """questions: of the sketched ones the first so many, of which the smaller pools are drawn by the seed."""

    sketched: Path
    model: str
    pool: Pool
    questions: int

    def cell(self, share: float, seed: int) -> Cell:
        """A row: every size of the pool."""
        facts = {name: value for name, value in asdict(self).items() if name != "sketched"}
        identity = content_id(VERSION, facts, SHARES, COUNTS, asdict(configured()))
        return Cell(TABLE, f"{self.model.rpartition(':')[2]}, flip {share:.0%}", seed, identity)

    def fill(self, results: Results, seeds: int, say: Callable[[str], None]) -> None:
        """Write the rows that are missing."""
        wanted = [(self.cell(share, seed), share) for seed in range(seeds) for share in SHARES]
        wanted = [(cell, share) for cell, share in wanted if results.read(cell) is None]
        if not wanted:
            return
        found = sketches.read(self.sketched, ("real", "easy"))
        layout = layout_of(self.sketched)
        for cell, share in wanted:
            begun = time.monotonic()
            values: Values = {}
            for count in COUNTS:
                some = {
                    name: drawn(part.of(self.pool.languages, self.questions), count, cell.seed)
                    for name, part in found.items()
                }
                _add(values, str(count), [_of(some, share, cell.seed, layout)])
            each = [
                {name: part.of([language], self.questions) for name, part in found.items()}
                for language in self.pool.languages
            ]
            _add(values, ALONE, [_of(one, share, cell.seed, layout) for one in each])
            results.write(cell, values, time.monotonic() - begun)
            shown = ", ".join(format(values[f"auroc/{count}"], ".2f") for count in COUNTS)
            say(f"{cell.method}, seed {cell.seed}: {shown}")


def drawn(part: Sketches, count: int, seed: int) -> Sketches:
    """`count` questions in all languages, the same ones of every contrast."""
    n = len(part.languages)
    questions = list(range(part.frame.height // n))
    random.Random(seed_for("few", seed)).shuffle(questions)
    rows = [question * n + place for question in sorted(questions[:count]) for place in range(n)]
    return Sketches(part.frame[rows], part.sketch_ND[rows], part.languages)


def _of(some: Mapping[str, Sketches], share: float, seed: int, layout: SketchLayout) -> Values:
    damage = Damage("real", "flip", share, seed)
    return figures(plant(some, damage), damage, layout)


def _add(values: Values, name: str, found: Sequence[Values]) -> None:
    for figure in ("auroc", "left"):
        values[f"{figure}/{name}"] = sum(one[f"{figure}/{GATED}"] for one in found) / len(found)
