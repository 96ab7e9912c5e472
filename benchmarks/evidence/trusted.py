"""How many trusted pairs are needed? Directions from a few pairs that are known to be right (`conflict.target: dev`), every other pair
scored against them.

Half of the questions, by the seed, are the pool, in which labels are flipped; of the other half, so many intact pairs a language are the
trusted ones. With none, the pool's own pairs make the directions, each left out of its own (`conflict.target: train`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import polars as pl
import torch

from benchmarks.evidence.flips import FlipStudy
from benchmarks.evidence.real import numbers
from benchmarks.planted.damage import Damage, DamagedSet, plant
from benchmarks.planted.figures import by_language, kept_half
from benchmarks.planted.scoring import configured, score
from benchmarks.planted.sketches import Sketches
from benchmarks.quality.results import Values
from schemas.ids import seed_for
from stages.gradients.projections import SketchLayout

VERSION = 2
TABLE = "trusted"
SHARES = (0.25, 0.45)
COUNTS = (0, 1, 2, 4, 8, 16)


class Study(FlipStudy):
    """Half of the questions are the pool."""

    table, version, shares, counts = TABLE, VERSION, SHARES, COUNTS

    def measure(self, found: Mapping[str, Sketches], damage: Damage, layout: SketchLayout) -> Values:
        """See `FlipStudy.measure`; every count of trusted pairs, on one damaged pool."""
        values: Values = {}
        damaged = plant(found, damage)
        for count in COUNTS:
            both, trusted_N = with_trusted(damaged, found["real"], count, damage.seed)
            scores = score(both, configured(), layout, damage.seed, trusted_N if count else None)
            value_N, damaged_N = numbers(scores["score"])[~trusted_N], both.damaged_N[~trusted_N]
            weight = torch.ones(1, len(value_N) // len(both.languages), dtype=torch.float64)
            values[f"auroc/{count}"] = float(by_language(value_N, damaged_N, len(both.languages), weight).nanmean())
            frame = both.frame.filter(pl.Series((~trusted_N).numpy()))
            kept_N = kept_half(frame, value_N, "language")
            values[f"left/{count}"] = float(damaged_N[kept_N].double().mean())
        return values


def with_trusted(damaged: DamagedSet, intact: Sketches, count: int, seed: int) -> tuple[DamagedSet, torch.Tensor]:
    """(the pool's half of a damaged set and after it the trusted pairs, which are the trusted ones [N])."""
    n = len(damaged.languages)
    questions = list(range(damaged.frame.height // n))
    random.Random(seed_for("trusted", seed)).shuffle(questions)
    half = len(questions) // 2
    pool = [question * n + place for question in sorted(questions[:half]) for place in range(n)]
    trusted = [question * n + place for question in questions[half : half + count] for place in range(n)]
    both = DamagedSet(
        pl.concat([damaged.frame[pool], intact.frame[trusted]]),
        torch.cat([damaged.sketch_ND[pool], intact.sketch_ND[trusted]]),
        torch.cat([damaged.damaged_N[pool], torch.zeros(len(trusted), dtype=torch.bool)]),
        damaged.languages,
    )
    return both, torch.arange(len(pool) + len(trusted)) >= len(pool)
