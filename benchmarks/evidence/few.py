"""How few pairs are enough? Flipped labels found in pools of a few questions, and in one language by itself."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from benchmarks.evidence.flips import FlipStudy
from benchmarks.evidence.real import GATED, figures
from benchmarks.planted.damage import Damage, plant
from benchmarks.planted.sketches import Sketches
from benchmarks.quality.results import Values
from schemas.ids import seed_for
from stages.gradients.projections import SketchLayout

VERSION = 1
TABLE = "few"
SHARES = (0.2, 0.4)
COUNTS = (5, 10, 20, 40)
"""Pairs a language, of which these shares are whole numbers."""
ALONE = "alone"
"""One language with all its pairs; figures are means over the languages."""


class Study(FlipStudy):
    """The smaller pools are drawn by the seed."""

    table, version, shares, counts = TABLE, VERSION, SHARES, COUNTS

    def measure(self, found: Mapping[str, Sketches], damage: Damage, layout: SketchLayout) -> Values:
        """See `FlipStudy.measure`; every size of the pool, and one language by itself."""
        values: Values = {}
        for count in COUNTS:
            some = {name: drawn(part, count, damage.seed) for name, part in found.items()}
            _add(values, str(count), [figures(plant(some, damage), damage, layout)])
        each = [{n: part.of([code], self.questions) for n, part in found.items()} for code in self.pool.languages]
        _add(values, ALONE, [figures(plant(one, damage), damage, layout) for one in each])
        return values


def drawn(part: Sketches, count: int, seed: int) -> Sketches:
    """`count` questions in all languages, the same ones of every contrast."""
    n = len(part.languages)
    questions = list(range(part.frame.height // n))
    random.Random(seed_for("few", seed)).shuffle(questions)
    rows = [question * n + place for question in sorted(questions[:count]) for place in range(n)]
    return Sketches(part.frame[rows], part.sketch_ND[rows], part.languages)


def _add(values: Values, name: str, found: Sequence[Values]) -> None:
    for figure in ("auroc", "left"):
        values[f"{figure}/{name}"] = sum(one[f"{figure}/{GATED}"] for one in found) / len(found)
