"""How many trusted pairs are needed? Directions from a few pairs that are known to be right (`conflict.target: dev`), every other pair
scored against them.

Half of the questions, by the seed, are the pool, in which labels are flipped; of the other half, so many intact pairs a language are the
trusted ones. With none, the pool's own pairs make the directions, each left out of its own (`conflict.target: train`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl
import torch

from benchmarks.evidence.answers import Pool
from benchmarks.evidence.real import layout_of, numbers
from benchmarks.planted import sketches
from benchmarks.planted.damage import Damage, DamagedSet, plant
from benchmarks.planted.figures import by_language, kept_half
from benchmarks.planted.scoring import configured, score
from benchmarks.planted.sketches import Sketches
from benchmarks.quality.results import Cell, Results, Values
from schemas.ids import content_id, seed_for

VERSION = 2
TABLE = "trusted"
SHARES = (0.25, 0.45)
COUNTS = (0, 1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Study:
    """questions: how many of the sketched ones are used; half of them are the pool."""

    sketched: Path
    model: str
    pool: Pool
    questions: int

    def cell(self, share: float, seed: int) -> Cell:
        """A row: every count of trusted pairs, on one damaged pool."""
        facts = {name: value for name, value in asdict(self).items() if name != "sketched"}
        identity = content_id(VERSION, facts, SHARES, COUNTS, asdict(configured()))
        return Cell(TABLE, f"{self.model.rpartition(':')[2]}, flip {share:.0%}", seed, identity)

    def fill(self, results: Results, seeds: int, say: Callable[[str], None]) -> None:
        """Write the rows that are missing."""
        wanted = [(self.cell(share, seed), share) for seed in range(seeds) for share in SHARES]
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
            values: Values = {}
            damaged = plant(found, Damage("real", "flip", share, cell.seed))
            for count in COUNTS:
                both, trusted_N = with_trusted(damaged, found["real"], count, cell.seed)
                scores = score(both, configured(), layout, cell.seed, trusted_N if count else None)
                value_N, damaged_N = numbers(scores["score"])[~trusted_N], both.damaged_N[~trusted_N]
                weight = torch.ones(1, len(value_N) // len(both.languages), dtype=torch.float64)
                values[f"auroc/{count}"] = float(by_language(value_N, damaged_N, len(both.languages), weight).nanmean())
                frame = both.frame.filter(pl.Series((~trusted_N).numpy()))
                kept_N = kept_half(frame, value_N, "language")
                values[f"left/{count}"] = float(damaged_N[kept_N].double().mean())
            results.write(cell, values, time.monotonic() - begun)
            shown = ", ".join(format(values[f"auroc/{count}"], ".2f") for count in COUNTS)
            say(f"{cell.method}, seed {cell.seed}: {shown}")


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
