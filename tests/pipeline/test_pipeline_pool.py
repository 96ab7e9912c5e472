"""What a pool makes of its members' words and deaths: members follow a script, no process is started."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.commit import PartBuilder, PreparedPart
from pipeline.config_file import load_config
from pipeline.crew import MemberDied
from pipeline.executor import Reports
from pipeline.executor_errors import StageFailed
from pipeline.messages import Advanced, Assigned, Done, Leave, Limited, Offered, Order, ToDriver, ToWorker, Want
from pipeline.pool import Pool, _Job
from pipeline.rundir import RunDir
from pipeline.signals import StopSignals
from schemas.errors import UserError
from schemas.manifests import ShardRange
from schemas.tables import TABLES
from stages.catalog import BY_NAME

SPEC = BY_NAME["generate"]


class Scripted:
    """A member that says what its script says, a list of words for every time it is asked; a str: it dies of that."""

    log = Path("worker.log")

    def __init__(self, script: Sequence[list[ToDriver | str | MemberDied]], place: str = "here") -> None:
        self.told: list[ToWorker] = []
        self.place = place
        self._script = iter(script)
        self.killed = False

    def send(self, message: ToWorker) -> None:
        self.told.append(message)

    def received(self) -> Iterator[ToDriver]:
        for word in next(self._script, []):
            if isinstance(word, MemberDied):
                raise word
            if isinstance(word, str):
                raise MemberDied(word)
            yield word

    def end(self, seconds: float) -> None:
        self.kill()

    def kill(self) -> None:
        self.killed = True

    @property
    def taken(self) -> list[int | None]:
        return [message.shard and message.shard.index for message in self.told if isinstance(message, Assigned)]


class ScriptedCrew:
    def __init__(self, *members: Scripted) -> None:
        self._members, self.size_ = iter(members), 1

    def size(self, order: Order) -> int:
        return self.size_

    def start(self, order: Order, slot: int, of: int) -> Scripted:
        return next(self._members)

    def wait(self, members: object, seconds: float) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


class Heard:
    """Reports that remember."""

    def __init__(self) -> None:
        self.offered: list[int] = []
        self.notes: list[str] = []
        self.started: list[int] = []
        self.joined: list[str] = []

    def reports(self) -> Reports:
        nothing = lambda *_: None  # noqa: E731
        return Reports(
            joined=lambda place, log: self.joined.append(place),
            total=nothing,
            advance=nothing,
            note=self.notes.append,
            started=lambda index, place: self.started.append(index),
            offered=lambda part, place: self.offered.append(part.index),
            tick=nothing,
        )


@pytest.fixture
def run(write_config, tmp_path: Path):
    """Carry out an order of so many shards with these members; what was heard."""
    config = load_config(write_config(execution={"watchdog_minutes": 1e-9}))

    def run(*members: Scripted, shards: int = 2, size: int = 1, watched: bool = False) -> Heard:
        execution = config.execution if watched else config.execution.model_copy(update={"watchdog_minutes": 0})
        crew = ScriptedCrew(*members)
        crew.size_ = size
        ranges = {n: ShardRange(index=n, start=n, stop=n + 1) for n in range(shards)}
        order = Order(SPEC, 0, config, tmp_path, tmp_path, "f", {}, {}, ranges)
        heard = Heard()
        Pool(crew, execution, StopSignals()).run(order, None, heard.reports())
        return heard

    return run


@pytest.fixture
def part(tmp_path: Path):
    """A prepared part, its files on disk."""

    def part(index: int) -> PreparedPart:
        builder = PartBuilder(RunDir(tmp_path), SPEC, 0, index, "f", tmp_path)
        builder.write("candidates", pa.table(TABLES["candidates"].schema.empty_table()))
        return builder.finish([], [], {}, 0.0)

    return part


def test_what_a_member_offered_before_it_died_counts_and_only_what_it_held_is_made_again(run, part):
    first = Scripted([[Want()], [Offered(part(0)), Want(), "signal 9"]])
    second = Scripted([[Want()], [Offered(part(1)), Want()], [Done()]])
    heard = run(first, second)
    assert heard.offered == [0, 1] and second.taken == [1, None]
    assert first.killed and heard.notes == ["a worker died (signal 9); starting another"]


def test_a_part_of_a_member_that_does_not_hold_the_shard_is_not_committed_and_its_files_go(run, part, tmp_path):
    late = part(0)
    member = Scripted([[Offered(late), Want()], [Offered(part(0)), Want()], [Done()]])
    heard = run(member, shards=1)
    assert heard.offered == [0]
    assert len(list(tmp_path.glob("*.parquet"))) == 1, "only the files of the one that was offered by its holder"
    assert not (tmp_path / late.moves[0][0]).exists()


def test_a_member_that_says_nothing_of_use_for_too_long_is_replaced(run, part):
    silent = Scripted([[Want(), Advanced(0, {"tokens_per_s": 1.0})], []])
    other = Scripted([[Want(), Offered(part(0)), Want(), Done()]])
    heard = run(silent, other, shards=1, watched=True)
    assert silent.killed and heard.offered == [0] and "watchdog" in heard.notes[0]


def test_members_that_die_without_finishing_anything_end_the_run(run):
    with pytest.raises(UserError, match=r"3 worker processes died.*exit code 1.*same command continues"):
        run(*(Scripted([[Want(), "exit code 1"]]) for _ in range(3)))


def test_a_member_that_forgets_a_shard_is_a_defect(run):
    with pytest.raises(StageFailed, match="taken but not returned"):
        run(Scripted([[Want(), Want(), Done()]]))


def test_what_memory_allowed_one_member_holds_for_the_next(run, part):
    first = Scripted([[Want(), Limited({"engine.batch_size": 4}), "signal 9"]])
    second = Scripted([[Want(), Offered(part(0)), Want(), Done()]])
    run(first, second, shards=1)
    order = next(message for message in second.told if isinstance(message, Order))
    assert order.limits == {"engine.batch_size": 4}


def test_idle_members_are_all_told_to_leave_before_any_is_waited_for(write_config, tmp_path):
    config, order_of_events = load_config(write_config()), []

    class Polite(Scripted):
        def send(self, message: ToWorker) -> None:
            super().send(message)
            if isinstance(message, Leave):
                order_of_events.append("told")

        def end(self, seconds: float) -> None:
            order_of_events.append("waited")

    pool = Pool(ScriptedCrew(Polite([]), Polite([])), config.execution, StopSignals())
    order = Order(SPEC, 0, config, tmp_path, tmp_path, "f", {}, {}, {})
    pool._seats = [pool._start(_Job(order, Heard().reports(), deque(), 2)) for _ in range(2)]
    pool.close()
    assert order_of_events == ["told", "told", "waited", "waited"]


def test_members_without_room_are_not_waited_for_once_nothing_is_left(run, part):
    waiting = Scripted([], place="")
    first = Scripted([[Want()], [Offered(part(0)), Want()], [Offered(part(1)), Want()], [Done()]])
    heard = run(first, waiting, size=2)
    assert heard.offered == [0, 1] and waiting.killed and heard.joined == ["here"]


def test_an_idle_member_takes_over_before_a_new_one_is_started(run, part):
    dying = Scripted([[Want()], [], [], ["signal 9"]])
    idle = Scripted(
        [[Want()], [Offered(part(1)), Want()], [Done()], [], [Want()], [Offered(part(0)), Want()], [Done()]]
    )
    heard = run(dying, idle, size=2)  # a third would be an error: there is none
    assert sorted(heard.offered) == [0, 1] and idle.taken == [1, None, 0, None]


def test_members_that_go_with_one_node_are_one_death(run, part):
    lost = [Scripted([[Want(), MemberDied("the loss of its node", counts=not n)]]) for n in range(4)]
    last = Scripted([[Want()], *([Offered(part(n)), Want()] for n in range(4)), [Done()]])
    heard = run(*lost, last, shards=4)
    assert heard.offered == [0, 1, 2, 3]


def test_a_crew_that_grows_gives_more_members_while_the_stage_runs(write_config, tmp_path, part, monkeypatch):
    monkeypatch.setattr("pipeline.pool._COUNT_SECONDS", 0.0)
    config = load_config(write_config())
    slow = Scripted([[Want()], [], [], [Offered(part(0)), Want()], [Done()]])
    joined = Scripted([[Want()], [Offered(part(1)), Want()], [Done()]], place="a node that joined")
    crew = ScriptedCrew(slow, joined)
    counts = iter([1, 1, 2])
    crew.size = lambda order: next(counts, 2)  # type: ignore[method-assign]
    ranges = {n: ShardRange(index=n, start=n, stop=n + 1) for n in range(2)}
    heard = Heard()
    Pool(crew, config.execution, StopSignals()).run(
        Order(SPEC, 0, config, tmp_path, tmp_path, "f", {}, {}, ranges), None, heard.reports()
    )
    assert sorted(heard.offered) == [0, 1] and heard.joined == ["here", "a node that joined"]
