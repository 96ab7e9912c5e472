"""Study 3: does training on the curated half gain? LoRA DPO by the project's own train stage, on real answers with damaged labels.

Every arm takes equally many pairs of one pool (`all` the whole of it) and equally many optimizer steps from the same model:

    all        the pool as it is
    random     a random half of every language
    curated    the half that the relevance gate and the conflict score keep
    baseline   the half that another filter keeps (`BASELINE`)
    oracle     a random half of every language without a damaged pair

Held out are the undamaged pairs of other prompts, in the trained languages and in unseen ones.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from benchmarks.evidence.answers import Answers, Pool
from benchmarks.evidence.arms import CELLS, MANY, POOLS, SEEN, UNSEEN, table_of
from benchmarks.evidence.real import layout_of
from benchmarks.planted import sketches
from benchmarks.planted.damage import Damage, DamagedSet, plant
from benchmarks.planted.figures import kept_half
from benchmarks.planted.scoring import configured, gated, numbers, rank_all, score
from benchmarks.quality.results import Cell, Results, Values
from benchmarks.quality.training import config_of, train
from benchmarks.quality.world import Size, World
from schemas.ids import content_id, seed_for
from stages.gradients.batching import TokenBudget
from stages.gradients.logprobs import logprobs_of_rows
from stages.gradients.rows import BatchRow, Pair
from stages.models.device import device_of, dtype_of
from stages.models.load import load_causal_lm
from stages.models.resolve import resolve
from stages.text.render import Renderer
from stages.train.model import precision
from stages.train.objectives import Scores, accuracies
from stages.train.objectives import score as logps_of
from stages.train.scoring import Scorer

VERSION = 1
BASELINE = "mean_direction"
LORA: dict[str, Any] = {
    "method": "lora",
    "learning_rate": 1e-4,
    "max_steps": 25,
    "batch_size": 4,
    "micro_batch_size": 1,
    "lora": {"r": 16},
}
_BUDGET = 2048


@dataclass(frozen=True)
class Setup:
    """seen: languages of the pool, of those that are sketched; unseen: languages only held-out pairs are in; held_out: pairs a language; split:
    instead at least so many pairs in the seen and in the unseen languages, which makes rows of another table."""

    sketched: Path
    work: Path
    model: str
    pool: Pool
    questions: int
    seen: tuple[str, ...] = SEEN
    unseen: tuple[str, ...] = UNSEEN
    held_out: int = 40
    split: int = 0

    def cell(self, pool: str, arm: str, seed: int) -> Cell:
        """A row of the study."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("sketched", "work", "split")}
        if self.split:
            facts["held_out"] = [self.count(self.seen), self.count(self.unseen)]
        chosen_by = {"curated": asdict(configured()), "baseline": BASELINE}.get(arm)
        return Cell(table_of(self.split), f"{pool}, {arm}", seed, content_id(VERSION, facts, LORA, chosen_by))

    def count(self, languages: Sequence[str]) -> int:
        """Held-out pairs in each of these languages."""
        return -(-self.split // len(languages)) if self.split else self.held_out

    def fill(
        self, results: Results, data: Path, seeds: Sequence[int], only: Sequence[str], say: Callable[[str], None]
    ) -> None:
        """Write the rows that are missing, of cells with one of `only` in their name."""
        bench: Bench | None = None
        for seed in seeds:
            for pool, arm in MANY if self.split else CELLS:
                cell = self.cell(pool, arm, seed)
                if not any(part in cell.method for part in only) or results.read(cell) is not None:
                    continue
                bench = bench or Bench(self, Answers.read(data))
                begun = time.monotonic()
                values = bench.measure(pool, arm, seed)
                seconds = time.monotonic() - begun
                results.write(cell, values, seconds)
                say(
                    f"{cell.method}, seed {seed}: reward accuracy {values['reward_accuracy/seen']:.3f}, {seconds:.0f} s"
                )


class Bench:
    """What all cells share: the model, the sketches, the held-out pairs and what the untrained model says of them."""

    def __init__(self, setup: Setup, answers: Answers) -> None:
        self.setup = setup
        self.model = resolve(setup.model)
        contrasts = ("real", "easy")
        self.found = {
            name: part.of(setup.seen, setup.questions)
            for name, part in sketches.read(setup.sketched, contrasts).items()
        }
        self.layout = layout_of(setup.sketched)
        self.held_out = {
            "seen": setup.pool.held_out(answers, setup.seen, setup.count(setup.seen)),
            "unseen": setup.pool.held_out(answers, setup.unseen, setup.count(setup.unseen)),
        }
        world = self.world(0)
        renderer = world.renderer
        self.ids = {name: [pair_of(renderer, row) for row in rows] for name, rows in self.held_out.items()}
        self.text = world.text()
        self.start = self._logps(world, self.model)
        self.start_text = self._text(world, self.model)

    def world(self, seed: int) -> World:
        """What `benchmarks.quality.training` wants to know; it has no questions of its own here."""
        from benchmarks.quality.corpus import Questions

        return World(seed, self.setup.work, Size(), None, self.model, Questions({}, {}, {}), "bfloat16")  # type: ignore[arg-type]

    def measure(self, pool: str, arm: str, seed: int) -> Values:
        """Train one arm and look at the held-out pairs."""
        kind, share = POOLS[pool]
        damaged = plant(self.found, Damage("real", kind, share, seed))
        kept_N = self.kept(damaged, arm, seed)
        frame = damaged.frame.filter(pl.Series(kept_N.numpy()))
        rows = [
            {
                **{name: row[name] for name in ("group_id", "language", "prompt", "chosen", "rejected")},
                "split": "train",
                "objective": "real",
            }
            for row in frame.iter_rows(named=True)
        ]
        world = self.world(seed)
        trained = train(world, self.setup.work / "now", self.model, rows, **LORA).model
        found = self._logps(world, trained)
        values: Values = {"pairs": float(len(rows)), "damaged": float(damaged.damaged_N[kept_N].double().mean())}
        for name in self.ids:
            figures = accuracies(found[name], self.start[name])
            values |= {f"accuracy/{name}": figures["accuracy"], f"reward_accuracy/{name}": figures["reward_accuracy"]}
            margins = gains(found[name], self.start[name])
            values[f"margin/{name}"] = sum(margins) / len(margins)
            values |= {f"gain/{name}/{number:03d}": gain for number, gain in enumerate(margins)}
            values[f"chosen/{name}"] = _chosen(found[name], self.start[name])
            values[f"accuracy_before/{name}"] = accuracies(self.start[name], self.start[name])["accuracy"]
        values["tax"] = self._text(world, trained) - self.start_text
        return values

    def kept(self, damaged: DamagedSet, arm: str, seed: int) -> torch.Tensor:
        """The pairs of the pool that an arm trains on [N]."""
        n = damaged.frame.height
        if arm == "all":
            return torch.ones(n, dtype=torch.bool)
        shuffled = list(range(n))
        random.Random(seed_for("half", seed)).shuffle(shuffled)
        value_N = torch.tensor(shuffled, dtype=torch.float64)
        if arm == "oracle":  # intact pairs first, in random order
            value_N = value_N - n * damaged.damaged_N
        elif arm == "curated":
            value_N, _ = gated(damaged, configured(), self.layout, seed)
        elif arm == "baseline":
            value_N = numbers(rank_all(score(damaged, configured(), self.layout, seed), (BASELINE,))[BASELINE])
        # every arm keeps half of ALL pairs: those that the gate holds back come last and are not reached
        return kept_half(damaged.frame, value_N, "language")

    def _logps(self, world: World, model: Any) -> dict[str, Scores]:
        """Of every held-out pair."""
        config = config_of(world)
        loaded = load_causal_lm(model, dtype_of(config), device_of(config))
        scorer = Scorer(precision(config, config.train), TokenBudget(_BUDGET), lambda amount, unit: lambda done: None)
        return {name: logps_of(loaded, pairs, scorer) for name, pairs in self.ids.items()}

    def _text(self, world: World, model: Any) -> float:
        """Loss of running text, nats a token."""
        config = config_of(world)
        loaded = load_causal_lm(model, dtype_of(config), device_of(config))
        rows: list[BatchRow] = self.text[:20]
        return -float(torch.cat(logprobs_of_rows(loaded, rows, TokenBudget(_BUDGET))).double().mean())


def pair_of(renderer: Renderer, row: Mapping[str, str]) -> Pair:
    """Token ids of a held-out pair."""
    sides = ([{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected"))
    ids = renderer.pair_ids([{"role": "user", "content": row["prompt"]}], *sides)
    return Pair(tuple(ids.prompt), tuple(ids.chosen), tuple(ids.rejected))


def gains(now: Scores, start: Scores) -> list[float]:
    """Of every pair what training added to log p(chosen) - log p(rejected)."""
    return [
        float((w.double() - w0.double()).sum() - (r.double() - r0.double()).sum())
        for (w, r), (w0, r0) in zip(now, start, strict=True)
    ]


def _chosen(now: Scores, start: Scores) -> float:
    """Mean change of the mean-token log-probability of chosen."""
    changes = [float((w.double() - w0.double()).mean()) for (w, _), (w0, _) in zip(now, start, strict=True)]
    return sum(changes) / len(changes)
