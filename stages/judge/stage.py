"""Judge: scores of the candidates by the judge model (docs/methods.md section 1)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import polars as pl
import pyarrow as pa

from schemas.ids import seed_for
from schemas.tables import TABLES
from stages.contract import Context, Drop, Part, Shard, ShardStage, tally
from stages.engines import shared_engine
from stages.engines.base import Completion, Request
from stages.engines.sharded import OpenShard, Results, run_shards
from stages.judge.additive import parse_vote
from stages.judge.answer_tokens import all_ids
from stages.judge.expected_score import expected_score, score_ids, score_prompt, score_tokens
from stages.judge.rubric import Rubric, load_rubric
from stages.text.language import same_language
from stages.text.render import RenderError


class Judge(ShardStage):
    """candidates, prompts -> judgements.

    Unit `candidate`: kept = candidates with a score. Dropped: low_mass (expected_score: too little probability on the
    score tokens), unparseable (additive: not one vote could be read), too_long_for_judge. Failed: cannot_render,
    engine_error. Unparseable votes of a kept candidate are rows with a null score.
    """

    def run(self, ctx: Context, shards: Iterator[Shard]) -> Iterator[Part]:
        """See ShardStage.run."""
        judging = _Judging(ctx)
        return run_shards(judging.engine, shards, judging.open, ctx.progress)


class _Judging:
    """One call of the stage: engine, score tokens, rubrics."""

    def __init__(self, ctx: Context) -> None:
        self._ctx, self._config = ctx, ctx.config.judge
        self.engine = shared_engine(ctx, "judge")
        self._scoring = self._config.method == "expected_score"
        self._tokens = score_tokens(self.engine.renderer.tokenizer) if self._scoring else {}
        self._rubrics: dict[str, Rubric] = {}

    def open(self, shard: Shard) -> OpenShard:
        """The requests of a shard of candidates."""
        rows = shard.rows.to_pylist()
        wanted = list({row["prompt_id"] for row in rows})
        prompts = self._ctx.scan("prompts").filter(pl.col("prompt_id").is_in(wanted)).select("prompt_id", "messages")
        messages = {row["prompt_id"]: row["messages"] for row in prompts.collect().to_dicts()}
        drops: dict[str, Drop] = {}
        requests: dict[str, list[Request]] = {}
        for row in rows:
            opened = self._requests(shard.index, row, messages[row["prompt_id"]])
            if isinstance(opened, Drop):
                drops[row["candidate_id"]] = opened
            else:
                requests[row["candidate_id"]] = opened
        return OpenShard(requests, len(drops), lambda results: self._part(shard.index, rows, drops, results))

    def _requests(self, index: int, row: dict[str, Any], messages: list[dict[str, str]]) -> list[Request] | Drop:
        """One request, or one per vote; or why there is none."""
        config, renderer = self._config, self.engine.renderer
        rubric = self._rubric(row["language"])
        answer = row["text"] if config.thoughts else renderer.thoughts.said(row["text"])
        texts = rubric.expected_score if self._scoring else rubric.additive
        system = config.sampling.system_prompt
        try:
            if self._scoring:
                ids = score_ids(renderer, texts, messages, answer, self._tokens, system)
            else:
                ids = renderer.prompt_ids(score_prompt(texts, messages, answer), system)
        except RenderError as error:
            return _drop(row, "cannot_render", str(error), failed=True)
        room = 1 if self._scoring else config.sampling.max_tokens
        if len(ids) + room > self.engine.context_length:
            return _drop(row, "too_long_for_judge", f"{len(ids)} tokens + {room} > {self.engine.context_length}")
        return [
            Request(
                id=f"{index}/{row['candidate_id']}/{vote}",
                prompt_ids=ids,
                sampling=config.sampling,
                seed=seed_for(self._ctx.config.seed, self._ctx.round, "judge", row["candidate_id"], vote),
                score_tokens=all_ids(self._tokens),
                group=index,
            )
            for vote in range(1 if self._scoring else config.votes)
        ]

    def _rubric(self, language: str) -> Rubric:
        if language not in self._rubrics:
            rubric = load_rubric(self._config.rubric, language)
            if not same_language(rubric.language, language):
                self._ctx.progress.note(f"no judge rubric for {language}: using the one in {rubric.language}")
            self._rubrics[language] = rubric
        return self._rubrics[language]

    def _part(self, index: int, rows: list[dict[str, Any]], drops: dict[str, Drop], results: Results) -> Part:
        judgements: list[dict[str, Any]] = []
        unparseable, masses = 0, []
        for row in rows:
            if row["candidate_id"] in drops:
                continue
            votes = self._votes(row, results[row["candidate_id"]])
            if isinstance(votes, Drop):
                drops[row["candidate_id"]] = votes
                continue
            judgements += votes
            unparseable += sum(vote["score"] is None for vote in votes)
            masses += [vote["mass"] for vote in votes if vote["mass"] is not None]
        return Part(
            index=index,
            tables={"judgements": pa.Table.from_pylist(judgements, schema=TABLES["judgements"].schema)},
            tallies=tally("candidate", [row["language"] for row in rows], drops.values()),
            drops=list(drops.values()),
            stats={"votes": float(len(judgements)), "unparseable_votes": float(unparseable), "mass_sum": sum(masses)},
        )

    def _votes(self, row: dict[str, Any], completions: list[Completion]) -> list[dict[str, Any]] | Drop:
        """The candidate's judgement rows, or why it has none."""
        error = next((c.error for c in completions if c.finish_reason not in ("stop", "length")), None)
        if error is not None:
            return _drop(row, "engine_error", error, failed=True)
        if self._scoring:
            score, mass = expected_score(completions[0].score_logprobs, self._tokens)
            if not math.isfinite(mass):
                return _drop(row, "engine_error", "the judge's probabilities are not finite (NaN)", failed=True)
            if score is None or mass < self._config.min_mass:
                return _drop(row, "low_mass", f"probability {mass:.3g} on the score tokens < {self._config.min_mass}")
            return [self._row(row, 0, score, mass)]
        scores = [parse_vote(completion.text, completion.finish_reason) for completion in completions]
        if all(score is None for score in scores):
            return _drop(row, "unparseable", f"none of {len(scores)} votes ends in `Score: k`")
        return [self._row(row, vote, score, None) for vote, score in enumerate(scores)]

    def _row(self, row: dict[str, Any], vote: int, score: float | None, mass: float | None) -> dict[str, Any]:
        return {
            "candidate_id": row["candidate_id"],
            "prompt_id": row["prompt_id"],
            "language": row["language"],
            "method": self._config.method,
            "judge_model": self._ctx.models["judge"].name,
            "vote": vote,
            "score": score,
            "mass": mass,
        }


def _drop(row: dict[str, Any], reason: str, detail: str, failed: bool = False) -> Drop:
    return Drop("candidate", row["candidate_id"], row["language"], reason, detail, failed)
