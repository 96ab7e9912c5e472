"""Evaluate: the model before and after training on held-out prompts and pairs and on authored pairs (docs/methods.md 9)."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.config.model import EngineConfig
from stages.contract import Account, ArtifactStage, Context, Drop, Rows
from stages.engines import close_engines
from stages.engines.base import Request, Tariff
from stages.engines.replies import Usage
from stages.evaluate import answers, loglik
from stages.evaluate.baseline import BaselineAnswers
from stages.evaluate.benchmarks import figures
from stages.evaluate.benchmarks.measuring import Benchmarks
from stages.evaluate.heldout import AUTHORED, HeldOut, HeldOutPrompt
from stages.evaluate.metrics import AFTER, BASELINE, BEFORE, CHANGE, Measurement, evaluation_table
from stages.evaluate.substeps import is_done, once
from stages.evaluate.winrate import AGAINST_BASELINE, AGAINST_BEFORE, Comparison, matches, win_rate_name
from stages.judge.pairwise import choice_tokens
from stages.models.load import settle_threads
from stages.text.assign import RunLanguages
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
            for role in ("initial", "trained", "evaluation_judge", "baseline", "second_judge")
            if role in ctx.models
        }
        compared = ctx.config.evaluate.win_rate and ctx.config.evaluate.prompts_per_language > 0
        self._judges = [role for role in ("evaluation_judge", "second_judge") if role in ctx.models and compared]
        self._contests = AGAINST_BASELINE if ctx.config.evaluate.baseline.given else AGAINST_BEFORE
        for role in self._judges:
            choice_tokens(self._renderers[role].tokenizer)  # refuse an unfit judge before the work
        self._given: BaselineAnswers | None = None
        by_file = bool(ctx.config.evaluate.baseline.answers) and compared
        self.held_out = HeldOut(ctx, self._renderers["initial"], self._answered if by_file else None)
        self._requests: dict[str, list[Request]] = {}
        refused: dict[str, Drop] = {}
        self._answering = _ROLES | ({BASELINE: "baseline"} if "baseline" in ctx.models and compared else {})
        for model, role in self._answering.items():
            self._requests[model], drops = answers.requests_for(ctx, self._renderers[role], self.held_out.prompts)
            refused |= {drop.row_id: drop for drop in drops}
        self.drops: list[Drop] = list(refused.values())
        if self._given is not None:
            self.held_out.came_in("row", self._given.languages.elements())
            self.drops += self._given.drops(self.held_out.prompts)
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
            for contest in self._contests if split != AUTHORED and self._ctx.config.evaluate.win_rate else ():
                yield contest.model, split, win_rate_name(self._ctx)

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
        for model in (AFTER, *([BASELINE] if BASELINE in self._answering else []), BEFORE):
            rows[model], drops = self._answers_of(model)
            failed |= {drop.row_id: drop for drop in drops}
        known = {drop.row_id for drop in self.drops}
        self.drops += [drop for row_id, drop in failed.items() if row_id not in known]
        if self._given is not None:
            rows[BASELINE], _ = answers.answer_rows(self._ctx, BASELINE, prompts, self._given.table(prompts))
        self.rows = [*rows[BEFORE], *rows[AFTER], *rows.get(BASELINE, [])]
        yield from answers.measure(self._ctx, prompts, self.rows)
        if self._judges:
            yield from self._win_rates()

    def benchmarks(self) -> list[dict[str, Any]]:
        """Rows of the tasks of lm-evaluation-harness, which has a process and memory of its own."""
        if self._tasks is None:
            return []
        close_engines(self._ctx)
        before, after = (self._tasks.measured(model) for model in (BEFORE, AFTER))
        self.stats["questions"] = float(sum(task.asked_of for task in self._tasks.tasks))
        return list(figures.rows(self._tasks.tasks, before, after, self._ctx.config.seed))

    def _answers_of(self, model: str) -> tuple[list[dict[str, Any]], list[Drop]]:
        ctx, role, requests = self._ctx, self._answering[model], self._requests[model]
        table = once(
            self._path(f"answers-{model}"),
            answers.identity(ctx, role, requests),
            partial(answers.answer, ctx, role, self._renderers[role], requests),
        )
        return answers.answer_rows(ctx, model, self.held_out.prompts, table)

    def _answered(self, prompts: Sequence[HeldOutPrompt]) -> Container[str]:
        """Of the prompts that may be asked those that the baseline's files have an answer to."""
        languages = RunLanguages(self._ctx.config.languages)
        self._given = BaselineAnswers(self._ctx, prompts, languages, self._renderers["initial"])
        return self._given.answered

    def _win_rates(self) -> Iterator[Measurement]:
        """Of every contest by the evaluation judge, then by the second one, so that each is loaded once; and their agreement."""
        judged = {role: self._judged(role) for role in self._judges}
        rates = {role: [comparison.rates(replies) for comparison, replies in found] for role, found in judged.items()}
        first = judged["evaluation_judge"]
        for comparison, replies in first:
            yield from comparison.measure(replies)
        if len(first) > 1:
            yield from _changes(*rates["evaluation_judge"])
        for (comparison, _), one, other in zip(first, *rates.values(), strict=True) if len(rates) > 1 else ():
            yield from comparison.agreement(one, other)
        for role, found in judged.items():
            self._account("win rate" if role == "evaluation_judge" else "second judge", found)

    def _judged(self, role: str) -> list[tuple[Comparison, pa.Table]]:
        """A judge's comparisons, and its replies to them. What a server is going to be asked is said before, what it took is in `stats`."""
        ctx, prompts, own = self._ctx, self.held_out.prompts, self._own_engine(role)
        comparisons = []
        for contest in self._contests:
            if role == "second_judge":
                contest = replace(contest, name="-".join(filter(None, [contest.name, "second"])))
            found = matches(contest, prompts, self.rows)
            comparisons.append(Comparison(ctx, self._renderers[role], found, contest, role, own))
        places = [self._verdicts(comparison, role) for comparison in comparisons]
        unknown = [
            one.requests for one, place in zip(comparisons, places, strict=True) if one.requests and not is_done(*place)
        ]
        if unknown and own is not None:
            answers.tell_cost(ctx, role, [request for requests in unknown for request in requests], own)
        ctx.progress.advance(2 * len(prompts) * len(comparisons) - sum(map(len, unknown)))
        judged = [(one, once(*place, one.judge)) for one, place in zip(comparisons, places, strict=True)]
        if own is not None and (tariff := Tariff.of(own, ctx.models[role].name)) is not None:
            usage = Usage.at_most(request for comparison in comparisons for request in comparison.requests)
            self.stats |= usage.stats(tariff)
        return judged

    def _own_engine(self, role: str) -> EngineConfig | None:
        return self._ctx.config.evaluate.second_judge.engine if role == "second_judge" else None

    def _verdicts(self, comparison: Comparison, role: str) -> tuple[Path, str]:
        """The file of its replies, and what they depend on."""
        path = self._path("-".join(filter(None, ["verdicts", comparison.contest.name])))
        return path, answers.identity(self._ctx, role, comparison.requests, self._own_engine(role))

    def _account(self, what: str, judged: Sequence[tuple[Comparison, pa.Table]]) -> None:
        """Count a judge's comparisons, those without a verdict, and prompts that the baseline has no answer to."""
        answered = {(row["model"], row["prompt_id"]) for row in self.rows}
        asked = without = missing = 0
        for comparison, replies in judged:
            contest = comparison.contest
            mine = [p for p in self.held_out.prompts if (contest.mine, p.row_id) in answered]
            lacking = [p for p in mine if (contest.other, p.row_id) not in answered]
            if contest.other != BASELINE:  # that model's own failure is counted already
                mine, lacking = [p for p in mine if p not in lacking], []
            self.held_out.came_in("comparison", [prompt.language for prompt in mine])
            self.drops += [
                Drop("comparison", contest.row_id(p.row_id), p.language, "no_baseline_answer") for p in lacking
            ]
            drops = comparison.drops(replies)
            self.drops += drops
            asked, without, missing = asked + len(mine) - len(lacking), without + len(drops), missing + len(lacking)
        note = self._ctx.progress.note
        if missing and what == "win rate":
            note(f"the baseline has no answer in {missing} of {asked + missing} comparisons (dropped/evaluation)")
        if without:
            units = "prompts" if len(judged) == 1 else "comparisons"
            note(f"{what}: no verdict on {without} of {asked} {units} (dropped/evaluation)")
        self.stats["compared" if what == "win rate" else "compared_by_second_judge"] = float(asked - without)

    def _announce(self) -> None:
        """The work left: pairs scored and prompts answered by each model, prompts compared in both orders."""
        ctx, prompts, pairs = self._ctx, self.held_out.prompts, self.held_out.pairs
        left = 2 * len(prompts) * len(self._judges) * len(self._contests)
        for model, role in self._answering.items():
            scored = model in _ROLES
            if scored and not is_done(self._path(f"loglik-{model}"), loglik.identity(ctx, ctx.models[role], pairs)):
                left += len(pairs)
            identity = answers.identity(ctx, role, self._requests[model])
            if not is_done(self._path(f"answers-{model}"), identity):
                left += len(self._requests[model])
        left += self._tasks.left if self._tasks is not None else 0
        ctx.progress.total(left, "item")

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.parquet"


def _changes(before: dict[str, Measurement], after: dict[str, Measurement]) -> Iterator[Measurement]:
    """Prompt by prompt, what a win rate gained."""
    for prompt, item in after.items():
        if prompt in before:
            gain = item.value - before[prompt].value
            yield Measurement(CHANGE, item.split, item.language, f"{item.metric}_change", item.group_id, gain)


def _with_local_engine(ctx: Context) -> Context:
    """A server serves the model it was started with, not the one just trained: answer with transformers, said aloud."""
    if ctx.config.engine.facts.has_weights:
        return ctx
    ctx.progress.note("evaluate answers with the transformers engine: engine.base_url does not serve the trained model")
    engine = ctx.config.engine.model_copy(update={"kind": "transformers"})
    return replace(ctx, config=ctx.config.model_copy(update={"engine": engine}))
