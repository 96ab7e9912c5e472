"""Answers of one model against those of another, judged in both orders by a fixed judge; and how far two judges agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from schemas.config.model import EngineConfig
from schemas.ids import seed_for
from stages.contract import Context, Drop
from stages.engines.base import JUDGE_ROOM, Request, context_length
from stages.evaluate.answers import complete
from stages.evaluate.heldout import HeldOutPrompt
from stages.evaluate.metrics import AFTER, BASELINE, BEFORE, CHANGE, Measurement
from stages.judge.answer_tokens import AnswerTokens, all_ids
from stages.judge.comparing import sign
from stages.judge.pairwise import choice_tokens, pairwise_ids, probability_of_a
from stages.judge.rubric import Rubrics
from stages.models.strict import config_of
from stages.text.messages import comparable
from stages.text.render import Renderer, RenderError

MIN_MASS = 0.1
"""Least probability on the replies A and B for a verdict to count; below it the judge did not answer the question."""

_SCHEMA = pa.schema(
    [("request_id", pa.string()), ("mine", pa.float64()), ("mass", pa.float64()), ("error", pa.string())]
)
_ORDERS = ("mine_first", "other_first")


@dataclass(frozen=True)
class Contest:
    """Whose answers (`model` of the answers table) are held against whose. model: what the figures are of; name: in ids and file names,
    empty for after against before."""

    model: str
    mine: str
    other: str
    name: str = ""

    def row_id(self, prompt_id: str) -> str:
        """A comparison's id."""
        return f"{prompt_id}/{self.name}" if self.name else prompt_id


AGAINST_BEFORE = (Contest(CHANGE, AFTER, BEFORE),)
AGAINST_BASELINE = (Contest(BEFORE, BEFORE, BASELINE, BEFORE), Contest(AFTER, AFTER, BASELINE, AFTER))


@dataclass(frozen=True)
class Match:
    """A prompt and its two answers. same: equal after normalisation, a tie that needs no judge."""

    prompt: HeldOutPrompt
    mine: str
    other: str

    @property
    def same(self) -> bool:
        return comparable(self.mine) == comparable(self.other)


def matches(contest: Contest, prompts: Sequence[HeldOutPrompt], rows: Sequence[dict[str, Any]]) -> list[Match]:
    """Prompts that both answered, in the order of `prompts`; rows: of the answers table."""
    texts = {(row["model"], row["prompt_id"]): row["text"] for row in rows}
    return [
        Match(prompt, texts[contest.mine, prompt.row_id], texts[contest.other, prompt.row_id])
        for prompt in prompts
        if (contest.mine, prompt.row_id) in texts and (contest.other, prompt.row_id) in texts
    ]


def win_rate_name(ctx: Context) -> str:
    """The metric's name: it says what answers are compared with, and when the round-0 policy judges its own answers."""
    name = "baseline_win_rate" if ctx.config.evaluate.baseline.given else "win_rate"
    same = ctx.models["evaluation_judge"].digest == ctx.models["initial"].digest
    return f"{name}_self_judged" if same else name


class Comparison:
    """The questions of a contest to the judge in `role`, and what its replies mean. renderer: the judge's; engine: its own, if it has one."""

    def __init__(
        self,
        ctx: Context,
        renderer: Renderer,
        found: Sequence[Match],
        contest: Contest = AGAINST_BEFORE[0],
        role: str = "evaluation_judge",
        engine: EngineConfig | None = None,
    ) -> None:
        self._ctx, self._renderer, self._matches = ctx, renderer, found
        self.contest, self._role, self._engine = contest, role, engine
        self._tokens: AnswerTokens = choice_tokens(renderer.tokenizer)
        self._rubrics = Rubrics(ctx.config.judge.rubric, ctx.progress.note)
        self._refused: dict[str, Drop] = {}
        self._context = _judge_context(ctx, role, engine or ctx.config.engine)
        self.requests = [request for match in found if not match.same for request in self._ask(match)]
        self.metric = win_rate_name(ctx)

    def judge(self) -> pa.Table:
        """Every reply: probability that `mine` is the better one (null: no mass), the mass, and why there is none."""
        rows = {}
        for completion in complete(self._ctx, self._role, self.requests, self._engine):
            first, mass = probability_of_a(completion.score_logprobs, self._tokens)
            if first is not None and completion.id.endswith(_ORDERS[1]):
                first = 1.0 - first
            error = completion.error if completion.finish_reason == "error" else None
            rows[completion.id] = {"request_id": completion.id, "mine": first, "mass": mass, "error": error}
        return pa.Table.from_pylist([rows[request.id] for request in self.requests], schema=_SCHEMA)

    def measure(self, replies: pa.Table) -> Iterator[Measurement]:
        """The items of the win rate, judge_consistency and judge_mass. A match without two valid replies is left out."""
        yield from self.rates(replies).values()
        for match, found in self._replied(replies):
            if match.same:
                continue
            yield self._item(match, "judge_mass", sum(row["mass"] for row in found) / 2)
            if _answered(found):
                one, other = (sign(row["mine"]) for row in found)
                yield self._item(match, "judge_consistency", float(one == other))

    def rates(self, replies: pa.Table) -> dict[str, Measurement]:
        """Prompt id -> the item of the win rate: 1 (mine is better), 0, or one half for a tie."""
        return {
            match.prompt.row_id: self._item(match, self.metric, _rate([sign(row["mine"]) for row in found]))
            for match, found in self._replied(replies)
            if match.same or _answered(found)
        }

    def agreement(self, mine: Mapping[str, Measurement], other: Mapping[str, Measurement]) -> Iterator[Measurement]:
        """The items of judge_agreement and judge_kappa: `rates` of two judges, of differing answers that both have a verdict on."""
        for match in self._matches:
            name, prompt = match.prompt.row_id, match.prompt
            if name in mine and name in other and not match.same:
                one, two = mine[name].value, other[name].value
                yield self._item(match, "judge_agreement", float(one == two))
                where = self.contest.model, prompt.split, prompt.language, "judge_kappa", prompt.group_id
                yield Measurement(*where, one, two)

    def _replied(self, replies: pa.Table) -> Iterator[tuple[Match, list[dict[str, Any]]]]:
        """Matches that need no judge, and those with a reply in both orders."""
        by_id = {row["request_id"]: row for row in replies.to_pylist()}
        for match in self._matches:
            if match.prompt.row_id in self._refused:
                continue
            found = [] if match.same else [by_id[self._request_id(match, order)] for order in _ORDERS]
            if all(row["error"] is None for row in found):
                yield match, found

    def drops(self, replies: pa.Table) -> list[Drop]:
        """Comparisons without a verdict. Unit `comparison`; reasons no_verdict, too_long_for_judge; failed: engine_error,
        cannot_render."""
        by_id = {row["request_id"]: row for row in replies.to_pylist()}
        found = list(self._refused.values())
        for match in self._matches:
            if match.prompt.row_id in self._refused:
                continue
            rows = [] if match.same else [by_id[self._request_id(match, order)] for order in _ORDERS]
            where = "comparison", self.contest.row_id(match.prompt.row_id), match.prompt.language
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
        where = "comparison", self.contest.row_id(prompt.row_id), prompt.language
        for order in _ORDERS:
            first, second = (match.mine, match.other) if order == _ORDERS[0] else (match.other, match.mine)
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
            requests.append(Request(self._request_id(match, order), ids, sampling, seed, score_tokens=scored))
        return requests

    def _item(self, match: Match, metric: str, value: float) -> Measurement:
        prompt = match.prompt
        length = float(len(match.mine) - len(match.other))
        return Measurement(self.contest.model, prompt.split, prompt.language, metric, prompt.group_id, value, length)

    def _request_id(self, match: Match, order: str) -> str:
        return f"{self.contest.row_id(match.prompt.row_id)}/{order}"


def _judge_context(ctx: Context, role: str, engine: EngineConfig) -> int:
    """Tokens the judge's engine is set up for; a server's may be fewer."""
    judge = ctx.models[role]
    if not engine.facts.has_weights or judge.path is None:
        return ctx.config.text.max_length + JUDGE_ROOM
    return context_length(config_of(judge, ctx.config.model.trust_remote_code), ctx.config)


def _answered(replies: Sequence[dict[str, Any]]) -> bool:
    return all(row["mine"] is not None and row["mass"] >= MIN_MASS for row in replies)


def _rate(verdicts: Sequence[int]) -> float:
    """Of both orders, or of none where the answers are the same: a verdict that turns with the order is a tie."""
    return 0.5 if not verdicts else float(verdicts[0] > 0) if verdicts[0] == verdicts[1] != 0 else 0.5
