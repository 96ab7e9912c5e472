"""Parts are committed in the background: in order, one at a time, nothing lost and no error swallowed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from pipeline import runner
from pipeline.config_file import load_config
from pipeline.messages import Order
from pipeline.writer import Writer
from schemas.manifests import ShardRange
from stages.catalog import BY_NAME
from stages.contract import Context, Part, Shard, ShardStage, Silent

PATIENCE = 60.0


def test_the_next_part_is_computed_while_the_last_is_written():
    computed, written = threading.Event(), []

    def commit(index: int) -> None:
        assert computed.wait(PATIENCE)  # part 1 is computed before part 0 is written: nobody waited for the disk
        written.append(index)

    with Writer(commit) as writer:
        writer.put(0)
        assert written == []
        computed.set()
        writer.put(1)
        assert written[0] == 0
    assert written == [0, 1]


def test_parts_are_committed_one_at_a_time_in_the_order_they_are_put():
    running, written = threading.Lock(), []

    def commit(index: int) -> None:
        assert running.acquire(blocking=False)
        written.append((index, threading.current_thread().name))
        running.release()

    with Writer(commit) as writer:
        for index in range(50):
            writer.put(index)
    assert [index for index, _ in written] == list(range(50))
    assert {name for _, name in written} == {"writer_0"}


@pytest.mark.parametrize("bad", [0, 2])
def test_an_error_surfaces_at_the_next_part_and_nothing_is_committed_after_it(bad):
    written, put = [], []

    def commit(index: int) -> None:
        if index == bad:
            raise OSError("no space left")
        written.append(index)

    with pytest.raises(OSError, match="no space left"), Writer(commit) as writer:
        for index in range(5):
            writer.put(index)
            put.append(index)
    assert written == list(range(bad)) and put == list(range(bad + 1))


def test_an_error_of_the_last_part_surfaces_at_the_end():
    def commit(index: int) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), Writer(commit) as writer:
        writer.put(0)


def test_a_stage_that_fails_keeps_the_part_being_written():
    failed, written = threading.Event(), []

    def commit(index: int) -> None:
        assert failed.wait(PATIENCE)
        written.append(index)

    with pytest.raises(RuntimeError, match="the stage"), Writer(commit) as writer:
        writer.put(0)
        failed.set()
        raise RuntimeError("the stage")
    assert written == [0]


def test_when_both_fail_the_stage_is_raised_and_the_other_logged(caplog):
    def commit(index: int) -> None:
        raise OSError("no space left")

    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(RuntimeError, match="the stage"),
        Writer(commit) as writer,
    ):
        writer.put(0)
        raise RuntimeError("the stage")
    assert "not committed" in caplog.text and "no space left" in caplog.text


def test_time_spent_waiting_for_the_disk_is_in_the_seconds_of_the_parts(tmp_path, write_config, monkeypatch):
    """A part takes 2 s to compute and 5 s to write: what the second waits for the first is its own."""
    clock, committed = [0.0], []

    class Stage(ShardStage):
        def run(self, ctx: Context, shards: Iterator[Shard]) -> Iterator[Part]:
            for shard in shards:
                clock[0] += 2.0
                yield Part(shard.index, {}, [])

    class SlowWriter(Writer[...]):
        def put(self, part: Part, seconds: float, limits: dict[str, int]) -> None:
            committed.append((part.index, seconds))
            clock[0] += 5.0

    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(runner, "stage_of", lambda spec: Stage())
    monkeypatch.setattr(runner, "read_range", lambda root, source, ends, shard, wait: None)
    monkeypatch.setattr(runner, "Writer", SlowWriter)
    config = load_config(write_config())
    shards = {n: ShardRange(index=n, start=n, stop=n + 1) for n in range(3)}
    order = Order(BY_NAME["generate"], 0, config, tmp_path, tmp_path, "", {"prompts": []}, {}, shards)
    left = iter([*shards.values(), None])
    runner.run_order(order, Context(config, 0, {}, {}, Silent()), lambda: next(left), lambda message: None)
    assert committed == [(0, 2.0), (1, 7.0), (2, 7.0)]
