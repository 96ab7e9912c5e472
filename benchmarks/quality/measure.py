"""What a model is worth: planted rewards, and the tax on what it could before."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from benchmarks.planted.texts import Language
from benchmarks.quality.corpus import LANGUAGES, OBJECTIVES, PREFERRED, PRIVATE, REFUSAL, preference_rows
from benchmarks.quality.training import config_of, context_of
from benchmarks.quality.world import World
from schemas.config import RunConfig
from schemas.config.model import Sampling
from schemas.ids import seed_for
from stages.contract import Context, ModelRef
from stages.engines.base import Request
from stages.evaluate.answers import complete
from stages.gradients.batching import TokenBudget
from stages.gradients.logprobs import logprobs_of_rows
from stages.gradients.rows import BatchRow as TokenRow
from stages.gradients.rows import Pair
from stages.models.device import device_of, dtype_of
from stages.models.load import load_causal_lm
from stages.train.model import precision
from stages.train.objectives import Scores, accuracies, score
from stages.train.scoring import Scorer

_BUDGET = 8192


@dataclass
class Measure:
    """Measures models of one world against its SFT model.

    Of every objective, on held-out pairs: accuracy/NAME (chosen has the higher mean-token log-probability) and reward/NAME (the higher
    log-ratio to SFT). Of sampled answers (temperature 1) to held-out questions: answered (a sentence of the right kind and
    language, whatever its numbers), over_refused (a refusal of a question that is not private), refused (of a private one).
    text, task: loss, nats per token, of held-out running text and of true answers of kinds no pair is about.
    """

    world: World

    def __call__(self, model: ModelRef) -> dict[str, float]:
        """The figures of a model."""
        config = config_of(self.world)
        loaded, scorer = load_causal_lm(model, dtype_of(config), device_of(config)), _scorer(config)
        values: dict[str, float] = {}
        for name, pairs in self.pairs.items():
            found = accuracies(score(loaded, pairs, scorer), self.start[name])
            values |= {f"accuracy/{name}": found["accuracy"], f"reward/{name}": found["reward_accuracy"]}
        values |= {name: _loss(loaded, rows) for name, rows in self._taxed.items()}
        del loaded
        return values | self._sampled(context_of(self.world, config, model, {}))

    @cached_property
    def pairs(self) -> dict[str, list[Pair]]:
        """Token ids of the held-out pairs of every objective."""
        renderer = self.world.renderer
        found: dict[str, list[Pair]] = {name: [] for name in OBJECTIVES}
        for row in preference_rows(self.world.questions, "test", self.world.seed):
            sides = ([{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected"))
            ids = renderer.pair_ids([{"role": "user", "content": row["prompt"]}], *sides)
            found[row["objective"]].append(Pair(tuple(ids.prompt), tuple(ids.chosen), tuple(ids.rejected)))
        return found

    @cached_property
    def start(self) -> dict[str, Scores]:
        """The held-out pairs under the SFT model."""
        config = config_of(self.world)
        loaded, scorer = load_causal_lm(self.world.sft, dtype_of(config), device_of(config)), _scorer(config)
        return {name: score(loaded, pairs, scorer) for name, pairs in self.pairs.items()}

    @cached_property
    def _taxed(self) -> dict[str, list[TokenRow]]:
        return {"text": self.world.text(), "task": self.world.task()}

    def _sampled(self, ctx: Context) -> dict[str, float]:
        renderer, asked = self.world.renderer, self._asked
        sampling = Sampling(temperature=1.0, max_tokens=40)
        requests = [
            Request(
                str(n), renderer.prompt_ids([{"role": "user", "content": q}]), sampling, seed_for(self.world.seed, n)
            )
            for n, (_, q, _, _) in enumerate(asked)
        ]
        answers = {int(c.id): c.text.strip() for c in complete(ctx, "policy", requests)}
        hits: dict[str, list[float]] = {"answered": [], "over_refused": [], "refused": []}
        for n, (private, _, pattern, refusal) in enumerate(asked):
            refused = answers[n] == refusal
            if private:
                hits["refused"].append(refused)
            else:
                hits["answered"].append(pattern.fullmatch(answers[n]) is not None)
                hits["over_refused"].append(refused)
        return {name: sum(found) / len(found) for name, found in hits.items()}

    @cached_property
    def _asked(self) -> list[tuple[bool, str, re.Pattern[str], str]]:
        """private, question, what fits it, the refusal in its language."""
        found = []
        for code in LANGUAGES:
            language = Language(code)
            for kind in (*PREFERRED, *PRIVATE):
                for question in self.world.questions.test[kind]:
                    both = {language.answer(question, right) for right in (True, False)}
                    pattern = re.compile("|".join(re.sub(r"\d+", r"\\d+", re.escape(text)) for text in sorted(both)))
                    found.append((kind in PRIVATE, language.question(question), pattern, REFUSAL[code]))
        return found


def _scorer(config: RunConfig) -> Scorer:
    return Scorer(precision(config, config.train), TokenBudget(_BUDGET), _silent)


def _silent(amount: int, unit: str) -> Callable[[int], None]:
    """Beats that nobody hears."""
    return lambda done: None


def _loss(model: Any, rows: list[TokenRow]) -> float:
    values = logprobs_of_rows(model, rows, TokenBudget(_BUDGET))
    return -float(torch.cat(values).double().mean())
