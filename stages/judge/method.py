"""What a judge method is: one class that turns candidates into requests, and the answers into votes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from schemas.config.judging import Judge
from schemas.ids import seed_for
from stages.contract import Context, Drop
from stages.engines import Wanted
from stages.engines.base import Completion, Engine, Request
from stages.engines.sharded import Results
from stages.text.render import RenderError


@dataclass(frozen=True)
class Candidate:
    """An answer to be judged. messages: its prompt. row: of the candidates table."""

    id: str
    prompt_id: str
    language: str
    messages: list[dict[str, str]]
    row: Mapping[str, Any]

    def dropped(self, reason: str, detail: str, failed: bool = False) -> Drop:
        """Why it has no verdict."""
        return Drop("candidate", self.id, self.language, reason, detail, failed)


@dataclass(frozen=True)
class Vote:
    """A judgement. score: None where the judge's reply could not be read. mass, consistency: see the judgements table."""

    score: float | None
    mass: float | None = None
    consistency: float | None = None


Verdict = list[Vote] | Drop
"""The votes on a candidate, or why there are none."""


@dataclass(frozen=True)
class Opened:
    """A shard as a method asks about it. requests: of whatever a question is about (a candidate, or a prompt), by id; counts: how
    many of the shard's candidates are done with it. settled: how many need no question. read: the answers, to a verdict of every
    candidate."""

    requests: dict[str, list[Request]]
    counts: dict[str, int]
    settled: int
    read: Callable[[Results], dict[str, Verdict]]


class Method(ABC):
    """One judge of a run. engines: those that `wanted` asked for, numbers[i] is what requests call the i-th."""

    def __init__(self, ctx: Context, judge: Judge, engines: Sequence[Engine], numbers: Sequence[int]) -> None:
        self.ctx, self.judge, self.settings = ctx, judge, judge.settings
        self.engines, self._numbers = engines, numbers
        self.engine, self.renderer = engines[0], engines[0].renderer

    @classmethod
    def wanted(cls, ctx: Context, judge: Judge) -> list[Wanted]:
        """The engines it needs."""
        settings, text = judge.settings, ctx.config.text
        own: dict[str, Any] = {"max_length": settings.max_length or text.max_length}
        if settings.chat_template:
            own["chat_template"] = settings.chat_template
        return [Wanted(judge.role, settings.facts.task, settings.engine, text.model_copy(update=own))]

    @abstractmethod
    def open(self, index: int, candidates: Sequence[Candidate]) -> Opened:
        """The questions about a shard."""

    def said(self, candidate: Candidate) -> str:
        """The answer as the judge is shown it: without its thought, unless judge.thoughts."""
        text: str = candidate.row["text"]
        return text if self.settings.thoughts else self.renderer.thoughts.said(text)

    def request(self, index: int, about: str, part: object, ids: Sequence[int], **more: Any) -> Request:
        """A request of this judge. part: which of those about the same."""
        key = [] if self.judge.key == "/" else [self.judge.key]
        engine = self._numbers[more.pop("of", 0)]
        return Request(
            id="/".join(map(str, [index, about, part, *key])),
            prompt_ids=list(ids),
            sampling=self.settings.sampling,
            seed=seed_for(self.ctx.config.seed, self.ctx.round, "judge", about, part, *key),
            group=index,
            engine=engine,
            **more,
        )

    def too_long(self, candidate: Candidate, request: Request) -> Drop | None:
        """Why a request cannot be asked, if it cannot."""
        limit = min(engine.context_length for engine in self.engines)
        if self.settings.facts.task != "text" and self.settings.max_length:
            limit = min(limit, self.settings.max_length)
        room = request.room
        if len(request.prompt_ids) + room <= limit:
            return None
        return candidate.dropped("too_long_for_judge", f"{len(request.prompt_ids)} tokens + {room} > {limit}")


class Pointwise(Method):
    """A method that judges every answer by itself."""

    @abstractmethod
    def ask(self, index: int, candidate: Candidate) -> list[Request] | Drop:
        """The requests about a candidate. Raises RenderError."""

    @abstractmethod
    def verdict(self, candidate: Candidate, completions: Sequence[Completion]) -> Verdict:
        """What the answers, none of them an error, say."""

    def open(self, index: int, candidates: Sequence[Candidate]) -> Opened:
        """See `Method.open`."""
        drops: dict[str, Drop] = {}
        requests: dict[str, list[Request]] = {}
        for candidate in candidates:
            asked = self._ask(index, candidate)
            if isinstance(asked, Drop):
                drops[candidate.id] = asked
            else:
                requests[candidate.id] = asked

        def read(results: Results) -> dict[str, Verdict]:
            return {c.id: drops[c.id] if c.id in drops else self._verdict(c, results[c.id]) for c in candidates}

        return Opened(requests, dict.fromkeys(requests, 1), len(drops), read)

    def _ask(self, index: int, candidate: Candidate) -> list[Request] | Drop:
        try:
            asked = self.ask(index, candidate)
        except RenderError as error:
            return candidate.dropped("cannot_render", str(error), failed=True)
        if isinstance(asked, Drop):
            return asked
        return next((long for one in asked if (long := self.too_long(candidate, one))), asked)

    def _verdict(self, candidate: Candidate, completions: Sequence[Completion]) -> Verdict:
        error = error_of(completions)
        if error is not None:
            return candidate.dropped("engine_error", error, failed=True)
        return self.verdict(candidate, completions)


def error_of(completions: Sequence[Completion]) -> str | None:
    """Why one of the requests was not answered."""
    return next((c.error for c in completions if c.finish_reason not in ("stop", "length")), None)


def under(opened: Opened, prefix: str) -> Opened:
    """The same questions under ids that no other judge uses."""
    return replace(
        opened,
        requests={f"{prefix}{about}": requests for about, requests in opened.requests.items()},
        counts={f"{prefix}{about}": count for about, count in opened.counts.items()},
        read=lambda results: opened.read({about: results[f"{prefix}{about}"] for about in opened.requests}),
    )
