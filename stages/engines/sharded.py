"""Shards in, parts out as they complete, while requests of further shards keep the engine fed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from stages.contract import Part, Progress, Shard
from stages.engines.base import Completion, Engine, Request

Results = dict[str, list[Completion]]


@dataclass(frozen=True)
class OpenShard:
    """A shard that was turned into requests.

    requests: row id -> its requests; a row of the shard, or whatever its requests are about. settled: rows of the shard that need
    none. finish: row id -> completions in the order of its requests, to the part. counts: row id -> rows of the shard that are done
    with it; default: 1.
    """

    requests: dict[str, list[Request]]
    settled: int
    finish: Callable[[Results], Part]
    counts: Mapping[str, int] = field(default_factory=dict)


class _Pending:
    """A shard's requests in flight."""

    def __init__(self, shard: OpenShard) -> None:
        self.shard = shard
        self.answers: dict[str, dict[str, Completion]] = {row: {} for row in shard.requests}
        self.missing = sum(map(len, shard.requests.values()))

    def add(self, row: str, completion: Completion) -> bool:
        """Whether the row is complete with this answer."""
        self.answers[row][completion.id] = completion
        self.missing -= 1
        return len(self.answers[row]) == len(self.shard.requests[row])

    def part(self) -> Part:
        results = {
            row: [self.answers[row][request.id] for request in requests]
            for row, requests in self.shard.requests.items()
        }
        return self.shard.finish(results)


def run_shards(
    engine: Engine, shards: Iterator[Shard], open_shard: Callable[[Shard], OpenShard], progress: Progress
) -> Iterator[Part]:
    """Yield the part of every shard, as soon as its last answer is there; shards are pulled as the engine has room.

    Progress is counted in rows; tokens_per_s is what was generated (and, for scoring, read) since the first request.
    """
    home: dict[str, tuple[_Pending, str, int]] = {}
    ready: deque[_Pending] = deque()
    begun = time.monotonic()
    tokens = 0

    def requests() -> Iterator[Request]:
        for shard in shards:
            opened = open_shard(shard)
            pending = _Pending(opened)
            if opened.settled:
                progress.advance(opened.settled)
            if not pending.missing:
                ready.append(pending)
            for row, row_requests in opened.requests.items():
                for request in row_requests:
                    home[request.id] = pending, row, request.read_tokens
                    yield request

    for completion in engine.stream(requests()):
        pending, row, read = home.pop(completion.id)
        tokens += read + completion.n_tokens
        if pending.add(row, completion):
            progress.advance(
                pending.shard.counts.get(row, 1), tokens_per_s=tokens / max(time.monotonic() - begun, 1e-9)
            )
        if not pending.missing:
            ready.append(pending)
        while ready:
            yield ready.popleft().part()
    while ready:
        yield ready.popleft().part()
