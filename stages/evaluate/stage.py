"""Evaluate: the model before and after training on held-out prompts and pairs and on authored pairs (docs/methods.md 9)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stages.contract import Account, ArtifactStage, Context, Drop, Rows
from stages.engines import close_engines
from stages.engines.base import Request
from stages.evaluate import answers, loglik
from stages.evaluate.benchmarks import figures
from stages.evaluate.benchmarks.measuring import Benchmarks
from stages.evaluate.heldout import AUTHORED, HeldOut
from stages.evaluate.metrics import AFTER, BEFORE, CHANGE, Measurement, evaluation_table
from stages.evaluate.substeps import is_done, once
from stages.evaluate.winrate import Comparison, matches, win_rate_name
from stages.judge.pairwise import choice_tokens
from stages.models.load import settle_threads
from stages.text.render import load_renderer

_ROLES = {BEFORE: "initial", AFTER: "trained"}


class Evaluate(ArtifactStage):
    """pairs:0, prompts, curated -> evaluation, answers.

    before is the round-0 policy, after this round's trained model; the judge is the same in every round. Each model is
    loaded as seldom as possible: log-probabilities of both, answers after, answers before, judging (with the engine
    that is loaded when the judge is the round-0 policy), benchmarks. Every sub-step leaves a file in ctx.folder, tied to the
    models' content, so that a crash repeats only the unfinished one. Units: see stages.evaluate.heldout.HeldOut;
    further drop reasons of prompts: prompt_too_long; failed: cannot_render, engine_error, and of pairs out_of_memory.
    Raises Stopped.
    """

    def run(self, ctx: Context) -> Iterator[Rows | Account]:
        """Measure, then yield both tables and the account."""
        ctx = _with_local_engine(ctx)
        settle_threads(ctx.config)
        evaluation = _Evaluation(ctx)
        items = [*evaluation.log_likelihoods(), *evaluation.answers()]
        table = evaluation_table(items, evaluation.expected(), ctx.config.seed, evaluation.benchmarks())
        yield Rows("evaluation", table)
        yield Rows("answers", answers.answers_table(evaluation.rows))
        drops = [*evaluation.held_out.drops, *evaluation.drops]
        yield Account(evaluation.held_out.tallies(evaluation.drops), drops, stats=evaluation.stats)


class _Evaluation:
    """One call of the stage. rows: of the answers table; drops: prompts that could not be answered."""

    def __init__(self, ctx: Context) -> None:
        self._ctx, self._folder = ctx, ctx.own_folder
        trust = ctx.config.model.trust_remote_code
        self._renderers = {
            role: load_renderer(ctx.models[role], ctx.config.text, trust)
            for role in ("initial", "trained", "evaluation_judge")
        }
        if ctx.config.evaluate.win_rate:
            choice_tokens(self._renderers["evaluation_judge"].tokenizer)  # refuse an unfit judge before the work
        self.held_out = HeldOut(ctx, self._renderers["initial"])
        self._requests: dict[str, list[Request]] = {}
        refused: dict[str, Drop] = {}
        for model, role in _ROLES.items():
            self._requests[model], drops = answers.requests_for(ctx, self._renderers[role], self.held_out.prompts)
            refused |= {drop.row_id: drop for drop in drops}
        self.drops: list[Drop] = list(refused.values())
        self.rows: list[dict[str, Any]] = []
        self._tasks = Benchmarks(ctx, _ROLES) if ctx.config.evaluate.tasks else None
        if self._tasks is not None:
            self.drops += self._tasks.drops()
            self.held_out.came_in("question", self._tasks.languages())
        self.stats = {"pairs": float(len(self.held_out.pairs)), "prompts": float(len(self.held_out.prompts))}
        self._announce()

    def expected(self) -> Iterator[tuple[str, str, str]]:
        """(model, split, metric) that are reported even when nothing could be measured."""
        for split in self.held_out.splits:
            yield BEFORE, split, "accuracy"
            yield AFTER, split, "accuracy"
            if split != AUTHORED and self._ctx.config.evaluate.win_rate:
                yield CHANGE, split, win_rate_name(self._ctx)

    def log_likelihoods(self) -> Iterator[Measurement]:
        """Accuracy and log-likelihood of the pairs before and after."""
        ctx, pairs = self._ctx, self.held_out.pairs
        scores = {}
        for model, role in _ROLES.items():
            ref = ctx.models[role]
            path, identity = self._path(f"loglik-{model}"), loglik.identity(ctx, ref, pairs)
            scores[model] = loglik.scores_of(once(path, identity, partial(loglik.score_pairs, ctx, ref, pairs)))
        scored = [pair for pair in pairs if all(pair.row_id in found for found in scores.values())]
        kept = {pair.row_id for pair in scored}
        detail = "the pair does not fit in memory, even alone"
        self.drops += [
            Drop("pair", pair.row_id, pair.language, "out_of_memory", detail, failed=True)
            for pair in pairs
            if pair.row_id not in kept
        ]
        yield from loglik.measure(scored, scores[BEFORE], scores[AFTER])

    def answers(self) -> Iterator[Measurement]:
        """Answers of both models, the trained one's first, then the win rate."""
        prompts = self.held_out.prompts
        if not prompts:
            return
        rows: dict[str, list[dict[str, Any]]] = {}
        failed: dict[str, Drop] = {}
        for model in (AFTER, BEFORE):
            rows[model], drops = self._answers_of(model)
            failed |= {drop.row_id: drop for drop in drops}
        known = {drop.row_id for drop in self.drops}
        self.drops += [drop for row_id, drop in failed.items() if row_id not in known]
        self.rows = [*rows[BEFORE], *rows[AFTER]]
        yield from answers.measure(self._ctx, prompts, self.rows)
        if self._ctx.config.evaluate.win_rate:
            yield from self._win_rate()

    def benchmarks(self) -> list[dict[str, Any]]:
        """Rows of the tasks of lm-evaluation-harness, which has a process and memory of its own."""
        if self._tasks is None:
            return []
        close_engines(self._ctx)
        before, after = (self._tasks.measured(model) for model in (BEFORE, AFTER))
        self.stats["questions"] = float(sum(task.asked_of for task in self._tasks.tasks))
        return list(figures.rows(self._tasks.tasks, before, after, self._ctx.config.seed))

    def _answers_of(self, model: str) -> tuple[list[dict[str, Any]], list[Drop]]:
        ctx, role, requests = self._ctx, _ROLES[model], self._requests[model]
        table = once(
            self._path(f"answers-{model}"),
            answers.identity(ctx, role, requests),
            partial(answers.answer, ctx, role, self._renderers[role], requests),
        )
        return answers.answer_rows(ctx, model, self.held_out.prompts, table)

    def _win_rate(self) -> Iterator[Measurement]:
        found = matches(self.held_out.prompts, self.rows)
        comparison = Comparison(self._ctx, self._renderers["evaluation_judge"], found)
        identity = answers.identity(self._ctx, "evaluation_judge", comparison.requests)
        verdicts, prompts = self._path("verdicts"), self.held_out.prompts
        asked = 0 if is_done(verdicts, identity) else len(comparison.requests)
        self._ctx.progress.advance(2 * len(prompts) - asked)
        replies = once(verdicts, identity, comparison.judge)
        drops = comparison.drops(replies)
        self.held_out.came_in("comparison", [match.prompt.language for match in found])
        self.drops += drops
        if drops:
            self._ctx.progress.note(
                f"win rate: no verdict on {len(drops)} of {len(found)} prompts (dropped/evaluation)"
            )
        self.stats["compared"] = float(len(found) - len(drops))
        yield from comparison.measure(replies)

    def _announce(self) -> None:
        """The work left: pairs scored and prompts answered by each model, prompts compared in both orders."""
        ctx, prompts, pairs = self._ctx, self.held_out.prompts, self.held_out.pairs
        left = 2 * len(prompts) if ctx.config.evaluate.win_rate else 0
        for model, role in _ROLES.items():
            if not is_done(self._path(f"loglik-{model}"), loglik.identity(ctx, ctx.models[role], pairs)):
                left += len(pairs)
            identity = answers.identity(ctx, role, self._requests[model])
            if not is_done(self._path(f"answers-{model}"), identity):
                left += len(self._requests[model])
        left += self._tasks.left if self._tasks is not None else 0
        ctx.progress.total(left, "item")

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.parquet"


def _with_local_engine(ctx: Context) -> Context:
    """A server serves the model it was started with, not the one just trained: answer with transformers, said aloud."""
    if ctx.config.engine.facts.has_weights:
        return ctx
    ctx.progress.note("evaluate answers with the transformers engine: engine.base_url does not serve the trained model")
    engine = ctx.config.engine.model_copy(update={"kind": "transformers"})
    return replace(ctx, config=ctx.config.model_copy(update={"engine": engine}))
