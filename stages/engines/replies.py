"""A server that is asked: every reply is on disk as it comes, so that nobody asks twice, and what was asked is counted."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from schemas.ids import content_id
from stages.contract import Context, Left, Shard
from stages.engines.base import Completion, Engine, Request, Tariff

_MILLION = 1_000_000


@dataclass
class Usage:
    """Requests, and the tokens that a server reads and writes for them."""

    requests: float = 0
    read: float = 0
    written: float = 0

    @classmethod
    def at_most(cls, requests: Iterable[Request]) -> Usage:
        """What requests come to whose answers are as long as they may be."""
        found = cls()
        for request in requests:
            found.add(request, request.room)
        return found

    @classmethod
    def of(cls, requests: Iterable[Request], completions: Iterable[Completion]) -> Usage:
        """What requests came to."""
        found = cls()
        for request, completion in zip(requests, completions, strict=True):
            found.add(request, _written(request, completion))
        return found

    def add(self, request: Request, written: int) -> None:
        """One more request."""
        self.requests += 1
        self.read += len(request.prompt_ids)
        self.written += written

    def plus(self, other: Usage) -> Usage:
        """Both together."""
        return Usage(self.requests + other.requests, self.read + other.read, self.written + other.written)

    def times(self, factor: float) -> Usage:
        """Of so many times as much."""
        return Usage(self.requests * factor, self.read * factor, self.written * factor)

    def cost(self, tariff: Tariff) -> float:
        """In the currency of the prices."""
        return (self.read * tariff.input_price + self.written * tariff.output_price) / _MILLION

    def stats(self, tariff: Tariff) -> dict[str, float]:
        """As a stage's `stats` say it; cost only where there are prices."""
        found = {"prompt_tokens": float(self.read), "generated_tokens": float(self.written)}
        return found | ({"cost": self.cost(tariff)} if tariff.priced else {})


def estimate(tariff: Tariff, most: Usage) -> str:
    """What a server is going to be asked, for people. most: `Usage.at_most` of it, about."""
    text = (
        f"{tariff.server} is going to be asked about {most.requests:,.0f} times: {most.read:,.0f} tokens to read, at most"
        f" {most.written:,.0f} to write"
    )
    return f"{text}; at most {most.cost(tariff):,.2f} by engine.input_price and output_price" if tariff.priced else text


def tell_cost(ctx: Context, table: str, shard: Shard, asked_of: Mapping[Asked, Sequence[Request]]) -> None:
    """Before the first request of a run: what its servers are going to be asked for the rows of `table` that are left, by the first shard; what
    is known of that one is not counted. asked_of: the shard's requests."""
    left = ctx.left or Left(0, ctx.scan(table).select(pl.len()).collect().item() if asked_of else 0)
    if shard.index != left.first:
        return
    most: dict[Tariff, Usage] = {}
    for server, requests in asked_of.items():
        others = Usage.at_most(requests).times((left.rows - len(shard.rows)) / len(shard.rows))
        usage = Usage.at_most(server.unknown(requests)).plus(others)
        most[server.tariff] = most.get(server.tariff, Usage()).plus(usage)
    for tariff, usage in most.items():
        ctx.progress.note(estimate(tariff, usage))


class Asked(Engine):
    """The engine of a server in one call of a stage: each reply is kept in the shard's unfinished file until the shard is committed, and
    what is in it already is not asked again. Errors are not kept. known: replies that were there already; usage: what was asked."""

    tariff: Tariff

    def __init__(self, engine: Engine, tariff: Tariff, unfinished: Callable[[int], Path]) -> None:
        self._engine, self._unfinished = engine, unfinished
        self.renderer, self.context_length, self.labels = engine.renderer, engine.context_length, engine.labels
        self.tariff = tariff
        self._shard: int | None = None
        self._replies: dict[str, Completion] = {}
        self.usage, self.known = Usage(), 0

    def stream(self, requests: Iterator[Request]) -> Iterator[Completion]:
        """See `Engine.stream`."""
        waiting: dict[str, tuple[Request, str]] = {}
        ready: deque[Completion] = deque()

        def unknown() -> Iterator[Request]:
            for request in requests:
                key = self._key(request)
                if (found := self._kept(request.group).get(key)) is not None:
                    self.known += 1
                    ready.append(replace(found, id=request.id))
                else:
                    waiting[request.id] = request, key
                    yield request

        for completion in self._engine.stream(unknown()):
            request, key = waiting.pop(completion.id)
            if completion.finish_reason != "error":
                self.usage.add(request, _written(request, completion))
                self._keep(request.group, key, completion)
            yield completion
            while ready:
                yield ready.popleft()
        yield from ready

    def unknown(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Those of the requests, shard by shard, that were not answered before."""
        return (request for request in requests if self._key(request) not in self._kept(request.group))

    def close(self) -> None:
        """It is closed by who opened it."""

    def told(self) -> str:
        """What was asked, for people."""
        usage, tariff = self.usage, self.tariff
        text = f"{tariff.server} answered {usage.requests:,.0f} requests: {usage.read:,.0f} tokens read, {usage.written:,.0f} written"
        if tariff.priced:
            text += f", {usage.cost(tariff):,.2f} by engine.input_price and output_price"
        return f"{text}; {self.known:,} more were answered before" if self.known else text

    def _key(self, request: Request) -> str:
        """What the reply depends on."""
        sampling = request.sampling.model_dump()
        return content_id(self.tariff.server, request.prompt_ids, sampling, request.seed, list(request.score_tokens))

    def _kept(self, shard: int) -> dict[str, Completion]:
        """The replies that an earlier process kept of a shard; requests come shard by shard."""
        if shard != self._shard:
            path = self._unfinished(shard)
            self._shard = shard
            self._replies = dict(_lines(path)) if path.is_file() else {}
        return self._replies

    def _keep(self, shard: int, key: str, completion: Completion) -> None:
        path = self._unfinished(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:  # a line begins anew where a process ended in the middle of one
            file.write(b"\n" + json.dumps([key, _stored(completion)]).encode() + b"\n")


def asked(engine: Engine, ctx: Context) -> Engine:
    """The engine with its replies kept and counted, if it is a server; as it is where nothing is to be kept (a sample of `doctor`'s)."""
    if ctx.unfinished is None or engine.tariff is None:
        return engine
    return Asked(engine, engine.tariff, ctx.unfinished)


def _written(request: Request, completion: Completion) -> int:
    """A request for scores has one token written."""
    return 1 if request.score_tokens else completion.n_tokens


def _stored(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "n_tokens": completion.n_tokens,
        "finish_reason": completion.finish_reason,
        "score_logprobs": list(completion.score_logprobs.items()),
        "values": completion.values,
    }


def _lines(path: Path) -> Iterator[tuple[str, Completion]]:
    """The replies in a file; a line that was cut is none."""
    for line in path.read_bytes().splitlines():
        try:
            key, stored = json.loads(line)
            scores = {int(token): float(value) for token, value in stored.pop("score_logprobs")}
            yield key, Completion(id="", score_logprobs=scores, values=tuple(stored.pop("values")), **stored)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
