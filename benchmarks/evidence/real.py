"""Study 1: does the score find damage in preference pairs of real answers? Every filter, with and without the relevance gate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import torch

from benchmarks.evidence.answers import Answers, Pool
from benchmarks.planted import sketches
from benchmarks.planted.damage import Damage, DamagedSet, plan, plant
from benchmarks.planted.figures import by_language, kept_half, overall
from benchmarks.planted.scoring import BASELINES, STOOD_FOR, Setting, configured, gated, numbers, rank_all, score
from benchmarks.quality.results import Cell, Results, Values
from schemas.ids import content_id
from stages.gradients.projections import SketchLayout
from stages.gradients.store import LAYOUT_KEY

VERSION = 4
"""Raise it when a change of code changes figures: rows of another version count as missing."""
KINDS = ("flip", "twins", "off_topic", "language", "conflict")
TABLE = "real"
GATED, UNGATED = "ours", "ours without the gate"


@dataclass(frozen=True)
class Study:
    """One model's sketches of a pool of pairs, of which the first `questions` count."""

    work: Path
    model: str
    pool: Pool
    contrasts: tuple[str, ...]
    questions: int

    @property
    def identity(self) -> str:
        """What rows depend on beside the seed."""
        return content_id(VERSION, self.model, asdict(self.pool), self.questions, asdict(configured()))

    def cells(self, seeds: int) -> Iterator[tuple[Cell, Damage]]:
        """Rows of the study."""
        for seed in range(seeds):
            for damage in plan(list(self.contrasts), list(KINDS), seed):
                if damage.contrast == "real":
                    name = f"{self.model.rpartition(':')[2]}, {damage.kind}" + (
                        "" if damage.kind == "conflict" else f" {damage.share:.0%}"
                    )
                    yield Cell(TABLE, name, seed, self.identity), damage

    def fill(self, results: Results, seeds: int, say: Callable[[str], None]) -> None:
        """Write the rows that are missing, once the questions are sketched."""
        wanted = [(cell, damage) for cell, damage in self.cells(seeds) if results.read(cell) is None]
        if not wanted:
            return
        found, layout = sketches.read(self.work, list(self.contrasts)), layout_of(self.work)
        there = next(iter(found.values())).frame.height // len(self.pool.languages)
        if there < self.questions:
            say(f"{self.model}: {there} of {self.questions} questions are sketched: no rows yet")
            return
        found = {name: part.of(self.pool.languages, self.questions) for name, part in found.items()}
        for cell, damage in wanted:
            begun = time.monotonic()
            values = figures(plant(found, damage), damage, layout)
            results.write(cell, values, time.monotonic() - begun)
            say(f"{cell.method}, seed {cell.seed}: {values[f'auroc/{GATED}']:.3f}")


def sketch(work: Path, model: str, pool: Pool, contrasts: Sequence[str], data: Path, threads: int) -> int:
    """Sketch the pairs of a pool, or what is left of them. Returns the pipeline's exit code."""
    made = pool.pairs(Answers.read(data))
    pairs = {contrast: made[contrast] for contrast in contrasts}
    return sketches.make(work, model, list(pool.languages), pairs, 0, threads=threads, asked=asked)


def asked(prompt: str) -> list[dict[str, str]]:
    """The conversation of a prompt: nothing is added."""
    return [{"role": "user", "content": prompt}]


def layout_of(work: Path) -> SketchLayout:
    """The layout the run's sketches were made with."""
    file = next(iter(sketches.gradient_files(work)))
    return SketchLayout.from_json((pq.read_schema(file).metadata or {})[LAYOUT_KEY].decode())


def figures(damaged: DamagedSet, damage: Damage, layout: SketchLayout) -> Values:
    """auroc/FILTER and left/FILTER (damaged share of the half that is kept), and what the gate held back of damaged and of intact pairs."""
    setting = configured()
    ours_N, passes_N = gated(damaged, setting, layout, damage.seed)
    values: Values = {
        "gate/damaged": _share(~passes_N, damaged.damaged_N),
        "gate/intact": _share(~passes_N, ~damaged.damaged_N),
        "pairs": float(damaged.frame.height),
    }
    everyone_N = torch.ones_like(passes_N)
    ranked = [(GATED, ours_N, passes_N)]
    ranked += [(name, value_N, everyone_N) for name, value_N in _ungated(damaged, setting, layout, damage.seed)]
    for name, value_N, pool_N in ranked:
        values[f"auroc/{name}"] = _auroc(damaged, damage, value_N)
        values[f"left/{name}"] = _left(damaged, damage, value_N, pool_N)
    return values


def _ungated(
    damaged: DamagedSet, setting: Setting, layout: SketchLayout, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """(filter, what it ranks all pairs by)."""
    # round 0: the policy is its own reference and every implicit margin 0; the margin of mean-token log-probabilities stands for it
    scores = score(damaged, setting, layout, seed).with_columns(implicit_margin=pl.col("logp_margin"))
    names = ("conflict", *BASELINES, *STOOD_FOR)
    for name, column in zip(names, rank_all(scores, names, seed).iter_columns(), strict=True):
        yield UNGATED if name == "conflict" else name, numbers(column)


def _auroc(damaged: DamagedSet, damage: Damage, value_N: torch.Tensor) -> float:
    n = len(damaged.languages)
    ones = torch.ones(1, damaged.frame.height // n, dtype=torch.float64)
    if damage.kind == "conflict":
        return float(overall(value_N, damaged.damaged_N, n, ones)[0])
    return float(by_language(value_N, damaged.damaged_N, n, ones).nanmean())


def _left(damaged: DamagedSet, damage: Damage, value_N: torch.Tensor, pool_N: torch.Tensor) -> float:
    kept_N = kept_half(damaged.frame, value_N, "global" if damage.kind == "conflict" else "language", pool_N)
    return float(damaged.damaged_N[kept_N].double().mean())


def _share(held_N: torch.Tensor, of_N: torch.Tensor) -> float:
    return float(held_N[of_N].double().mean()) if bool(of_N.any()) else float("nan")
