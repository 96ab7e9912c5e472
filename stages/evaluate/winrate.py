"""Answers after training against answers before, judged in both orders by the fixed evaluation judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from schemas.ids import seed_for
from stages.contract import Context, Drop
from stages.engines.base import JUDGE_ROOM, Request, context_length
from stages.evaluate.answers import complete
from stages.evaluate.heldout import HeldOutPrompt
from stages.evaluate.metrics import CHANGE, Measurement
from stages.judge.answer_tokens import AnswerTokens, all_ids
from stages.judge.pairwise import choice_tokens, pairwise_ids, probability_of_a
from stages.judge.rubric import Rubrics
from stages.models.strict import config_of
from stages.text.messages import comparable
from stages.text.render import Renderer, RenderError

MIN_MASS = 0.1
"""Least probability on the replies A and B for a verdict to count; below it the judge did not answer the question."""

_SCHEMA = pa.schema(
    [("request_id", pa.string()), ("after", pa.float64()), ("mass", pa.float64()), ("error", pa.string())]
)
_ORDERS = ("after_first", "before_first")


@dataclass(frozen=True)
class Match:
    """A prompt and its two answers. same: equal after normalisation, a tie that needs no judge."""

    prompt: HeldOutPrompt
    before: str
    after: str

    @property
    def same(self) -> bool:
        return comparable(self.before) == comparable(self.after)


def matches(prompts: Sequence[HeldOutPrompt], rows: Sequence[dict[str, Any]]) -> list[Match]:
    """Prompts both models answered, in the order of `prompts`; rows: of the answers table."""
    texts = {(row["model"], row["prompt_id"]): row["text"] for row in rows}
    return [
        Match(prompt, texts["before", prompt.row_id], texts["after", prompt.row_id])
        for prompt in prompts
        if ("before", prompt.row_id) in texts and ("after", prompt.row_id) in texts
    ]


def win_rate_name(ctx: Context) -> str:
    """The metric's name: it says when the round-0 policy judges its own answers."""
    same = ctx.models["evaluation_judge"].digest == ctx.models["initial"].digest
    return "win_rate_self_judged" if same else "win_rate"


class Comparison:
    """The questions to the judge, and what its replies mean. renderer: the judge's."""

    def __init__(self, ctx: Context, renderer: Renderer, found: Sequence[Match]) -> None:
        self._ctx, self._renderer, self._matches = ctx, renderer, found
        self._tokens: AnswerTokens = choice_tokens(renderer.tokenizer)
        self._rubrics = Rubrics(ctx.config.judge.rubric, ctx.progress.note)
        self._refused: dict[str, Drop] = {}
        self._context = _judge_context(ctx)
        self.requests = [request for match in found if not match.same for request in self._ask(match)]
        self.metric = win_rate_name(ctx)

    def judge(self) -> pa.Table:
        """Every reply: probability that the answer after training is the better one (null: no mass), the mass, and why there is none."""
        rows = {}
        for completion in complete(self._ctx, "evaluation_judge", self.requests):
            first, mass = probability_of_a(completion.score_logprobs, self._tokens)
            if first is not None and completion.id.endswith(_ORDERS[1]):
                first = 1.0 - first
            error = completion.error if completion.finish_reason == "error" else None
            rows[completion.id] = {"request_id": completion.id, "after": first, "mass": mass, "error": error}
        return pa.Table.from_pylist([rows[request.id] for request in self.requests], schema=_SCHEMA)

    def measure(self, replies: pa.Table) -> Iterator[Measurement]:
        """The items of the win rate, judge_consistency and judge_mass. A match without two valid replies is left out."""
        by_id = {row["request_id"]: row for row in replies.to_pylist()}
        for match in self._matches:
            if match.prompt.row_id in self._refused:
                continue
            if match.same:
                yield self._item(match, self.metric, 0.5)
                continue
            found = [by_id[_request_id(match, order)] for order in _ORDERS]
            if any(row["error"] is not None for row in found):
                continue
            yield self._item(match, "judge_mass", sum(row["mass"] for row in found) / 2)
            if not _answered(found):
                continue
            verdicts = [_sign(row["after"]) for row in found]
            agree = verdicts[0] == verdicts[1] != 0
            yield self._item(match, "judge_consistency", float(verdicts[0] == verdicts[1]))
            yield self._item(match, self.metric, float(verdicts[0] > 0) if agree else 0.5)

    def drops(self, replies: pa.Table) -> list[Drop]:
        """Comparisons without a verdict. Unit `comparison`; reasons no_verdict, too_long_for_judge; failed: engine_error,
        cannot_render."""
        by_id = {row["request_id"]: row for row in replies.to_pylist()}
        found = list(self._refused.values())
        for match in self._matches:
            if match.prompt.row_id in self._refused:
                continue
            rows = [] if match.same else [by_id[_request_id(match, order)] for order in _ORDERS]
            where = "comparison", match.prompt.row_id, match.prompt.language
            errors = [row["error"] for row in rows if row["error"] is not None]
            if errors:
                found.append(Drop(*where, "engine_error", errors[0], failed=True))
            elif rows and not _answered(rows):
                least = min(row["mass"] for row in rows)
                found.append(Drop(*where, "no_verdict", f"probability {least:.3g} on A and B < {MIN_MASS}"))
        return found

    def _ask(self, match: Match) -> list[Request]:
        """The question in both orders; none where it cannot be put to the judge, which is noted."""
        rubric, prompt, requests = self._rubrics.of(match.prompt.language), match.prompt, []
        where = "comparison", prompt.row_id, prompt.language
        for order in _ORDERS:
            first, second = (match.after, match.before) if order == _ORDERS[0] else (match.before, match.after)
            try:
                ids = pairwise_ids(self._renderer, rubric, prompt.prompt, first, second, self._tokens)
            except RenderError as error:
                self._refused[prompt.row_id] = Drop(*where, "cannot_render", str(error), failed=True)
                return []
            if len(ids) + 1 > self._context:
                detail = f"{len(ids)} tokens + 1 > {self._context}"
                self._refused[prompt.row_id] = Drop(*where, "too_long_for_judge", detail)
                return []
            seed = seed_for(self._ctx.config.seed, "evaluate", "win rate", prompt.row_id, order)
            sampling, scored = self._ctx.config.evaluate.sampling, all_ids(self._tokens)
            requests.append(Request(_request_id(match, order), ids, sampling, seed, score_tokens=scored))
        return requests

    def _item(self, match: Match, metric: str, value: float) -> Measurement:
        prompt = match.prompt
        length = float(len(match.after) - len(match.before))
        return Measurement(CHANGE, prompt.split, prompt.language, metric, prompt.group_id, value, length)


def _judge_context(ctx: Context) -> int:
    """Tokens the judge's engine is set up for; a server's may be fewer."""
    judge = ctx.models["evaluation_judge"]
    if not ctx.config.engine.facts.has_weights or judge.path is None:
        return ctx.config.text.max_length + JUDGE_ROOM
    return context_length(config_of(judge, ctx.config.model.trust_remote_code), ctx.config)


def _request_id(match: Match, order: str) -> str:
    return f"{match.prompt.row_id}/{order}"


def _answered(replies: Sequence[dict[str, Any]]) -> bool:
    return all(row["after"] is not None and row["mass"] >= MIN_MASS for row in replies)


def _sign(probability: float) -> int:
    """1: the answer after training is better; -1: the one before; 0: neither."""
    return (probability > 0.5) - (probability < 0.5)
