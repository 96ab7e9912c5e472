"""Parts come out as they complete, and further shards are pulled meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from schemas.config.model import Sampling
from stages.contract import Part, Progress, Shard
from stages.engines.base import Completion, Request
from stages.engines.sharded import OpenShard, Results, run_shards


class LastInFirstOut:
    """An engine with room for `room` requests that answers the newest first."""

    def __init__(self, room: int) -> None:
        self.room, self.fed = room, [0]

    def stream(self, requests: Iterator[Request]) -> Iterator[Completion]:
        waiting: list[Request] = []
        for request in requests:
            waiting.append(request)
            self.fed.append(len(waiting))
            if len(waiting) == self.room:
                newest = waiting.pop()
                yield Completion(newest.id, newest.id, [], 1, "stop")
        for request in waiting:
            yield Completion(request.id, request.id, [], 1, "stop")


def shards(sizes: list[int], pulled: list[int]) -> Iterator[Shard]:
    for index, size in enumerate(sizes):
        pulled.append(index)
        yield Shard(index, pa.table({"row": [f"{index}-{i}" for i in range(size)]}))


def open_shard(shard: Shard) -> OpenShard:
    rows = shard.rows["row"].to_pylist()
    requests = {
        row: [Request(f"{row}/{k}", [1], Sampling(), 0, group=shard.index) for k in range(2)]
        for row in rows
        if not row.endswith("-3")
    }

    def finish(results: Results) -> Part:
        table = pa.table({"text": [c.text for row in rows for c in results.get(row, [])]})
        return Part(shard.index, {"t": table}, [])

    return OpenShard(requests, len(rows) - len(requests), finish)


def test_every_shard_is_finished_once_in_its_own_order_whatever_the_order_of_answers(progress: Progress) -> None:
    pulled: list[int] = []
    engine = LastInFirstOut(room=5)
    parts = list(run_shards(engine, shards([4, 0, 3, 1], pulled), open_shard, progress))
    assert sorted(part.index for part in parts) == [0, 1, 2, 3]
    for part in parts:
        texts = part.tables["t"]["text"].to_pylist()
        assert texts == sorted(texts)
    assert sum(part.tables["t"].num_rows for part in parts) == 2 * 7
    assert progress.done == 8


def test_a_part_comes_out_before_later_shards_are_all_pulled_and_the_engine_stays_full(progress: Progress) -> None:
    pulled: list[int] = []
    engine = LastInFirstOut(room=3)
    first = next(run_shards(engine, shards([3] * 50, pulled), open_shard, progress))
    assert first.index < 5
    assert len(pulled) < 10
    assert min(engine.fed[3:]) >= 2, "the engine drained between shards"


def test_shards_without_requests_are_finished_too(progress: Progress) -> None:
    parts = list(run_shards(LastInFirstOut(4), shards([0, 0], []), open_shard, progress))
    assert [part.index for part in parts] == [0, 1]
