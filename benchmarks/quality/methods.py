"""What a table consists of: named methods, each a function of a world that gives figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality.corpus import preference_rows
from benchmarks.quality.results import Values
from benchmarks.quality.training import Trained, train
from benchmarks.quality.world import World
from stages.contract import ModelRef

TOGETHER = ("helpful", "language")
"""The objectives that are trained at once where a table is of no sequence."""


@dataclass
class Bench:
    """A world, how its models are measured, and where models are kept that several methods of a table share.

    together: the objectives that a method trains on which is of no sequence of them.
    """

    world: World
    measure: Callable[[ModelRef], Values]
    scratch: Path
    together: tuple[str, ...] = TOGETHER

    def rows(self, *objectives: str) -> list[dict[str, str]]:
        """The pairs of some objectives: those of the train split to train on, the held-out ones as dev."""
        seed = self.world.seed
        found = [row for split in ("train", "test") for row in preference_rows(self.world.questions, split, seed)]
        return [row for row in found if row["objective"] in objectives]

    def train(self, name: str, objectives: tuple[str, ...], start: ModelRef | None = None, **settings: Any) -> Trained:
        """Train on some objectives, from the SFT model unless said."""
        return train(self.world, self.scratch / name, start or self.world.sft, self.rows(*objectives), **settings)


@dataclass(frozen=True)
class Method:
    """A line of a table. settings: what its figures depend on beside the world."""

    name: str
    run: Callable[[Bench, Mapping[str, Any]], Values]
    settings: Mapping[str, Any] = field(default_factory=dict)
