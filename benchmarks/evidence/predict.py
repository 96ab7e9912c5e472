"""Study 2: does the score predict what a step does? (A linear datamodeling score, arXiv 2303.14186, for pairs and across languages.)

One optimizer step on a few pairs of one language, and what it does to the loss of the OTHER languages on held-out pairs; then the model is put
back. A row is one step: the change, and the mean over the step's pairs of what each filter ranks by. Pairs are drawn at random (the rank correlation over
steps says which filter knew), or from one tenth of the language's pairs by their score.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from benchmarks.evidence.answers import Answers, Pool
from benchmarks.evidence.real import asked, layout_of
from benchmarks.planted import sketches
from benchmarks.planted.cause import BETA, Stepper
from benchmarks.planted.damage import Damage, plant
from benchmarks.planted.scoring import configured, rank_all, score
from benchmarks.quality.results import Cell, Results, Values
from schemas.ids import content_id, seed_for
from stages.models.resolve import resolve

VERSION = 1
TABLE = "predict"
RANDOM, DECILE = "one step", "one step on a decile"
DECILES = 10
FILTERS = ("conflict", "other_languages", "logp_margin", "random")
_PAIRS = 4
_HELD_OUT = 6
_RATE = 5e-6
_FLIPS = 0.25


@dataclass(frozen=True)
class Setup:
    """questions: how many of the sketched ones are used."""

    sketched: Path
    model: str
    pool: Pool
    questions: int

    def cell(self, method: str, step: int) -> Cell:
        """The row of a step; of `DECILE` tenth 0, the best scored, to 9 of the first language, then of the next."""
        facts = {name: value for name, value in asdict(self).items() if name != "sketched"}
        return Cell(
            TABLE, method, step, content_id(VERSION, facts, _PAIRS, _HELD_OUT, _RATE, _FLIPS, asdict(configured()))
        )

    def fill(self, results: Results, data: Path, steps: int, deciles: int, say: Callable[[str], None]) -> None:
        """Write the rows that are missing. deciles: of so many languages, the first ones."""
        wanted = [(RANDOM, step) for step in range(steps)] + [(DECILE, step) for step in range(DECILES * deciles)]
        wanted = [(method, step) for method, step in wanted if results.read(self.cell(method, step)) is None]
        if not wanted:
            return
        found = {
            name: part.of(self.pool.languages, self.questions)
            for name, part in sketches.read(self.sketched, ("real", "easy")).items()
        }
        damaged = plant(found, Damage("real", "flip", _FLIPS, 0))
        scores = score(damaged, configured(), layout_of(self.sketched))
        ranked = rank_all(scores, FILTERS).with_columns(norm=scores["norm"].cast(pl.Float64))
        score_N = ranked["conflict"].to_list()
        stepper = Stepper(resolve(self.model), asked=asked)
        rows = self.pool.held_out(Answers.read(data), self.pool.languages, _HELD_OUT)
        held_out = pl.DataFrame(rows)
        pairs = stepper.ids(held_out)
        before_N = stepper.margins(pairs)
        for number, (method, step) in enumerate(wanted):
            begun = time.monotonic()
            language = step % len(self.pool.languages) if method == RANDOM else step // DECILES
            picked = drawn(method, step, (damaged.language_N == language).nonzero()[:, 0].tolist(), score_N)
            stepper.step(stepper.ids(damaged.frame[picked]), _RATE, lambda: None)
            change_N = stepper.margins(pairs) - before_N
            stepper.restore()
            loss_N = -torch.nn.functional.logsigmoid(BETA * change_N) - math.log(2)
            others_N = torch.tensor([code != self.pool.languages[language] for code in held_out["language"]])
            values: Values = {
                "change": float(loss_N[others_N].double().mean()),
                "change/own": float(loss_N[~others_N].double().mean()),
            }
            values |= {f"mean/{name}": float(ranked[picked][name].mean()) for name in ranked.columns}  # type: ignore[arg-type]
            values["damaged"] = float(damaged.damaged_N[picked].double().mean())
            seconds = time.monotonic() - begun
            results.write(self.cell(method, step), values, seconds)
            say(f"{method} {step}, {number + 1} of {len(wanted)}: {values['change']:+.5f}, {seconds:.0f} s")


def drawn(method: str, step: int, own: Sequence[int], score_N: Sequence[float]) -> list[int]:
    """The pairs of a step, of a language's `own` ones: any, or of the step's tenth by score, the best scored first."""
    if method == DECILE:
        best = sorted(own, key=score_N.__getitem__, reverse=True)
        first, last = (len(best) * (step % DECILES + more) // DECILES for more in (0, 1))
        own = best[first:last]
    return random.Random(seed_for("step", step)).sample(own, min(_PAIRS, len(own)))


def correlation(rows: Mapping[int, Values], name: str, draws: int = 2000) -> tuple[float, float, float, float]:
    """Spearman's rank correlation of `mean/NAME` with the fall of the loss, its 95% bootstrap interval over steps, and what is left of it
    among the steps of one language (ranks less their language's mean). rows: by step."""
    table = np.array([(row[f"mean/{name}"], -row["change"]) for row in rows.values()])
    language = np.array([step % len(Pool().languages) for step in rows])
    rng = np.random.default_rng(0)

    def one(part: np.ndarray, of: np.ndarray | None = None) -> float:
        ranks = [pl.Series(column).rank("average").to_numpy() for column in part.T]
        if of is not None:
            ranks = [rank - np.array([rank[of == own].mean() for own in of]) for rank in ranks]
        return float(np.corrcoef(ranks)[0, 1]) if min(r.std() for r in ranks) > 0 else math.nan

    found = [one(table[rng.integers(0, len(table), len(table))]) for _ in range(draws)]
    low, high = np.nanquantile(found, [0.025, 0.975])
    return one(table), float(low), float(high), one(table, language)
