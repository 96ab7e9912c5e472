"""Study 4: OMO, OrthAlign and ALLO on a real model with real answers.

The pretrained `MODEL` is fine-tuned by the project's own sft stage on answers of a third chat model, in all languages of study 3, to prompts that no pair is
about. From there every method trains all weights on undamaged pairs, made as those of study 3 but shorter:

    real       the stronger model's answer over the weaker one's
    language   the stronger model's answer over its answer to the same prompt in another language

What is in no sequence trains on `real` alone. Held out are pairs of both kinds in the trained languages, `real` ones in the unseen languages (`unseen`),
conversations like those of the fine-tuning (`tuned`) and running text (`text`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.evidence.answers import Answers, Pool, cut
from benchmarks.evidence.arms import METHODS, SEEN, SEQUENCE, UNSEEN
from benchmarks.evidence.training import gains, pair_of
from benchmarks.quality import allo, omo, orthalign
from benchmarks.quality.corpus import Questions, Turn
from benchmarks.quality.methods import Bench, Method
from benchmarks.quality.results import Cell, Results, Values
from benchmarks.quality.training import Trained, config_of, model_in
from benchmarks.quality.world import Size, World
from schemas.ids import content_id
from stages.contract import ModelRef
from stages.gradients.batching import TokenBudget
from stages.gradients.logprobs import logprobs_of_rows
from stages.gradients.rows import BatchRow
from stages.models.device import device_of, dtype_of
from stages.models.load import load_causal_lm
from stages.models.resolve import resolve
from stages.train.model import precision
from stages.train.objectives import Scores, accuracies
from stages.train.objectives import score as logps_of
from stages.train.scoring import Scorer

VERSION = 1
TABLE = "methods"
MODEL = "embedded:gemma-3-270m"
TUTOR = "gpt-4-0613"
"""Whose answers the fine-tuning learns."""
TUNED, TAXED, WORDS = 24, 8, 80
"""Prompts of the fine-tuning and of its held-out conversations; most words of their answers."""
SFT: dict[str, Any] = {"method": "full", "learning_rate": 2e-5, "batch_size": 8, "micro_batch_size": 8, "epochs": 1.0}
SIZE = Size(steps=25, learning_rate=1e-5)
BATCH: dict[str, Any] = {"batch_size": 2, "micro_batch_size": 2}
POOL = Pool(words=20)
"""Prompts and answers of half as many words as in study 3: all weights are trained here."""
Q_MAX = 64
"""The product's default."""
_BUDGET = 2048
_ROOT = Path(__file__).resolve().parents[2]


def methods() -> dict[str, Method]:
    """Name -> method, of `METHODS` and of the sequence."""
    named = {method.name: method for method in (*omo.methods(), *allo.methods())}
    ordered = {method.name: method for method in orthalign.methods(("real", "language"), Q_MAX)}
    return {name: named[name] for name in METHODS} | {name: ordered[name] for name in SEQUENCE}


@dataclass(frozen=True)
class Study:
    """work: folder of the fine-tuned model and of what is trained; held_out: pairs a language."""

    work: Path
    model: str
    pool: Pool
    held_out: int = 40

    def cell(self, method: Method, seed: int) -> Cell:
        """A row of the study."""
        return Cell(TABLE, method.name, seed, self.identity(method.name, dict(method.settings)))

    def identity(self, name: str, settings: dict[str, Any]) -> str:
        """What a model that a method trains depends on, but for the seed."""
        facts = (self.model, asdict(self.pool), self.held_out, SEEN, UNSEEN, TUTOR, TUNED, TAXED, WORDS, SFT)
        return content_id(VERSION, *facts, name, asdict(SIZE), BATCH, settings)

    def fill(
        self, results: Results, data: Path, seeds: Sequence[int], only: Sequence[str], say: Callable[[str], None]
    ) -> int:
        """Write the rows that are missing, of methods with one of `only` in their name. Returns the exit code of the fine-tuning."""
        answers = Answers.read(data)
        for seed in seeds:
            bench: RealBench | None = None
            for method in methods().values():
                cell = self.cell(method, seed)
                if not any(part in method.name for part in only) or results.read(cell) is not None:
                    continue
                if bench is None:
                    if code := self.fine_tune(answers):
                        return code
                    bench = RealBench.of(self, answers, seed)
                begun = time.monotonic()
                values = method.run(bench, method.settings)
                results.write(cell, values, time.monotonic() - begun)
                say(f"{method.name}, seed {seed}: {values['reward/real']:.3f}, {time.monotonic() - begun:.0f} s")
        return 0

    def fine_tune(self, answers: Answers) -> int:
        """Bring the fine-tuning up to date: an ordinary run as far as its sft stage. Returns the exit code of the pipeline."""
        self.work.mkdir(parents=True, exist_ok=True)
        tuned, _ = self.tuning(answers)
        rows = [
            {"prompt": turn.prompt, "completion": turn.answer, "language": code}
            for code, turns in tuned.items()
            for turn in turns
        ]
        (self.work / "tuned.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        config = {
            "name": "tuned",
            "run_dir": str(self.work.resolve()),
            "languages": {"seen": [*SEEN, *UNSEEN], "identify": False},
            "model": {"policy": self.model, "dtype": "bfloat16"},
            "text": {"max_length": 512},
            "sft": {"sources": [{"path": str((self.work / "tuned.jsonl").resolve())}], **SFT},
            "prompts": {"sources": [{"path": str((self.work / "tuned.jsonl").resolve())}]},
        }
        path = self.work / "tuned.yaml"
        path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        command = [sys.executable, "-m", "pipeline", "run", str(path.resolve()), "--until", "sft"]
        return subprocess.run(command, cwd=_ROOT, check=False).returncode

    def tuning(self, answers: Answers) -> tuple[dict[str, list[Turn]], list[Turn]]:
        """Conversations to learn, by language, and held-out ones. Raises ValueError where there are too few."""
        pairs = (self.pool.strong, self.pool.weak)
        used = set(
            answers.questions(self.pool.languages, pairs, self.pool.seed, (20, self.pool.words))[: 2 * self.pool.count]
        )
        used |= {
            row["group_id"] for codes in (SEEN, UNSEEN) for row in self.pool.held_out(answers, codes, self.held_out)
        }
        languages = (*SEEN, *UNSEEN)
        ids = [
            id_
            for id_ in answers.questions(languages, (TUTOR,), self.pool.seed, (5, WORDS))
            if id_ not in used and all(len(answers.texts[id_, code, TUTOR].split()) <= WORDS for code in languages)
        ]
        if len(ids) < TUNED + TAXED:
            raise ValueError(f"{len(ids)} prompts are left to fine-tune on, {TUNED + TAXED} are needed")

        def turns(code: str, some: Sequence[str]) -> list[Turn]:
            return [Turn(code, TUTOR, answers.prompts[id_, code], answers.texts[id_, code, TUTOR]) for id_ in some]

        held_out = [turn for code in languages for turn in turns(code, ids[TUNED : TUNED + TAXED])]
        return {code: turns(code, ids[:TUNED]) for code in languages}, held_out

    def held_out_rows(self, answers: Answers) -> dict[str, list[dict[str, str]]]:
        """real, language, unseen -> held-out pairs."""
        real = self.pool.held_out(answers, SEEN, self.held_out)
        language = []
        for number, row in enumerate(real):
            place = SEEN.index(row["language"])
            spoken = SEEN[(place + 1 + number // len(SEEN) % (len(SEEN) - 1)) % len(SEEN)]
            both = (answers.texts[row["group_id"], code, self.pool.strong] for code in (row["language"], spoken))
            chosen, rejected = cut(*both, self.pool.words)
            language.append({**row, "chosen": chosen, "rejected": rejected})
        return {"real": real, "language": language, "unseen": self.pool.held_out(answers, UNSEEN, self.held_out)}


@dataclass
class RealBench(Bench):
    """Undamaged pairs of both kinds, and how a model does on what is held out.

    Values: accuracy/NAME and reward/NAME of the held-out pairs; margin/real, nats; tax/tuned and tax/text: rise of the loss against the fine-tuned
    model, nats a token.
    """

    pairs: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, study: Study, answers: Answers, seed: int) -> RealBench:
        """The bench of a seed; the fine-tuned model is there."""
        folder = study.work / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        sft = resolve(str(study.work / "tuned" / "sft" / "model"), cache=study.work / "cache")
        world = World(seed, folder, SIZE, resolve(study.model), sft, Questions({}, {}, {}), "bfloat16")
        made, held_out = study.pool.pairs(answers), study.held_out_rows(answers)
        pairs = [  # the group is part of a pair's id, and both kinds are of the same prompts
            {**row, "group_id": f"{name}-{row['group_id']}", "objective": name, "split": split}
            for name in ("real", "language")
            for split, rows in (("train", made[name]), ("test", held_out[name]))
            for row in rows
            if row["language"] in SEEN
        ]
        scratch = folder / f"scratch-{study.identity('adamw', {})}"  # a model that is kept is of these settings
        return cls(world, _Measure(world, held_out, study.tuning(answers)[1]), scratch, ("real",), pairs)

    def rows(self, *objectives: str) -> list[dict[str, str]]:
        """The pairs of some objectives."""
        return [row for row in self.pairs if row["objective"] in objectives]

    def train(self, name: str, objectives: tuple[str, ...], start: ModelRef | None = None, **settings: Any) -> Trained:
        """As the other bench does. What plain AdamW leaves of `together` is kept: offline merging starts from it."""
        plain = start is None and objectives == self.together and not settings
        folder = self.scratch / "adamw"
        if plain and (folder / "finished").is_file():
            return Trained(model_in(self.world, folder), {})
        trained = super().train("adamw" if plain else name, objectives, start, **BATCH, **settings)
        if plain:
            (folder / "finished").touch()
        return trained


class _Measure:
    """Of a model against the fine-tuned one."""

    def __init__(self, world: World, held_out: dict[str, list[dict[str, str]]], turns: Sequence[Turn]) -> None:
        self.world = world
        renderer = world.renderer
        self.ids = {name: [pair_of(renderer, row) for row in rows] for name, rows in held_out.items()}
        self.taxed: dict[str, list[BatchRow]] = {"text": world.text()[:20], "tuned": world.rows(turns)}
        self.start, self.losses = self._of(world.sft)

    def __call__(self, model: ModelRef) -> Values:
        """The figures of a model."""
        found, losses = self._of(model)
        values: Values = {}
        for name, start in self.start.items():
            figures = accuracies(found[name], start)
            values |= {f"accuracy/{name}": figures["accuracy"], f"reward/{name}": figures["reward_accuracy"]}
        margins = gains(found["real"], self.start["real"])
        values["margin/real"] = sum(margins) / len(margins)
        return values | {f"tax/{name}": losses[name] - self.losses[name] for name in losses}

    def _of(self, model: ModelRef) -> tuple[dict[str, Scores], dict[str, float]]:
        config = config_of(self.world)
        loaded = load_causal_lm(model, dtype_of(config), device_of(config))
        budget = TokenBudget(_BUDGET)
        scorer = Scorer(precision(config, config.train), budget, lambda amount, unit: lambda done: None)
        found = {name: logps_of(loaded, pairs, scorer) for name, pairs in self.ids.items()}
        losses = {
            name: -float(torch.cat(logprobs_of_rows(loaded, rows, budget)).double().mean())
            for name, rows in self.taxed.items()
        }
        return found, losses
