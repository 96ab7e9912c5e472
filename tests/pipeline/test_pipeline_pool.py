"""What a pool makes of its members' words and deaths, over both crews: workers follow a script, no process and no cluster is started."""

from __future__ import annotations

import re
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from pipeline.cluster_crew import ClusterCrew, ClusterMember
from pipeline.commit import PartBuilder, PreparedPart
from pipeline.config_file import load_config
from pipeline.crew import Member, MemberDied
from pipeline.executor import Reports
from pipeline.executor_errors import Interrupted, StageFailed
from pipeline.local_crew import LocalCrew, LocalMember
from pipeline.messages import Advanced, Assigned, Done, Leave, Limited, Offered, Order, ToDriver, ToWorker, Want
from pipeline.node_host import Died, Placed
from pipeline.pool import Pool, _Job
from pipeline.ray_crew import RayCrew
from pipeline.ray_member import RayMember
from pipeline.rundir import RunDir
from pipeline.signals import StopSignals
from schemas.errors import UserError
from schemas.manifests import ShardRange
from schemas.tables import TABLES
from stages.catalog import BY_NAME
from stages.children import ChildDied, stop_flag
from stages.contract import Share
from tests.crews import over_both_crews

SPEC = BY_NAME["generate"]


Script = Sequence[list[ToDriver | str | MemberDied]]


class Scripted:
    """A worker that says what its script says, a list of words for every time it is asked; a str: it dies of that."""

    def __init__(self, script: Script, place: str = "here") -> None:
        self.told: list[ToWorker] = []
        self.place = place
        self._script = iter(script)
        self.killed = False

    def says(self) -> list[ToDriver | str | MemberDied]:
        return next(self._script, [])

    def end(self, seconds: float) -> None:
        self.kill()

    def kill(self) -> None:
        self.killed = True

    @property
    def taken(self) -> list[int | None]:
        return [message.shard and message.shard.index for message in self.told if isinstance(message, Assigned)]


class ScriptedChild:
    """A process of this machine, as a LocalMember has it."""

    def __init__(self, worker: Scripted) -> None:
        self._worker, self.end, self.kill = worker, worker.end, worker.kill
        self.send = worker.told.append

    def messages(self) -> Iterator[ToDriver]:
        for word in self._worker.says():
            if isinstance(word, str):
                raise ChildDied(word)
            yield word


class ScriptedActor:
    """One on a node, as a RayMember has it. Its first word is where it is; where it has no place yet, it says nothing."""

    def __init__(self, worker: Scripted) -> None:
        self.worker = worker
        self.placed = False

    def __getattr__(self, method: str) -> object:
        call = self.worker.told.append if method == "tell" else lambda *_: self
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=call))

    def words(self) -> list[object]:
        words: list[object] = self.worker.says()
        if self.worker.place and not self.placed:
            self.placed, words = True, [Placed(self.worker.place, ()), *words]
        if words and isinstance(words[-1], MemberDied):
            raise ScriptedRay.exceptions.RayError("The actor died:\n  No module named 'pipeline'")
        return [Died(word) if isinstance(word, str) else word for word in words]


class ScriptedRay:
    """What RayCrew asks of Ray. A reference is the actor itself."""

    exceptions = SimpleNamespace(RayError=type("RayError", (Exception,), {}))

    def wait(self, references, num_returns=1, timeout=0.0):
        return references, []

    def get(self, actor: ScriptedActor) -> list[object]:
        return actor.words()

    def kill(self, actor: ScriptedActor) -> None:
        actor.worker.kill()


class ScriptedCluster:
    def __init__(self) -> None:
        self.ray = ScriptedRay()

    def check_lives(self) -> None: ...

    def name_of(self, node_id: str) -> str:
        return node_id


class ClientHere:
    """Ray's client without a process of its own."""

    def __init__(self, crew: RayCrew) -> None:
        self._crew = crew

    def call(self, method, *arguments):
        return method(self._crew, *arguments)

    def close(self) -> None: ...


class _Scripted:
    """What the scripted crews do instead of looking at machines: members are those that are given, in this order."""

    def size(self, order: Order) -> int:
        return self.size_

    def start(self, order: Order, slot: int, of: int) -> Member:
        return next(self.members)


class ScriptedLocal(_Scripted, LocalCrew):
    def __init__(self, tmp_path: Path, workers: Sequence[Scripted]) -> None:
        self.members = (LocalMember(ScriptedChild(worker), Path("worker.log"), worker.place) for worker in workers)
        self._stop = stop_flag()

    def wait(self, members: object, seconds: float) -> None: ...


class ScriptedOnRay(_Scripted, ClusterCrew):
    def __init__(self, tmp_path: Path, workers: Sequence[Scripted]) -> None:
        inner, lost = RayCrew.__new__(RayCrew), set()
        inner._cluster = ScriptedCluster()
        actors = [ScriptedActor(worker) for worker in workers]
        inner._members = {
            n: RayMember(inner._cluster, actor, Path("worker.log"), tmp_path, lost) for n, actor in enumerate(actors)
        }
        self._client = ClientHere(inner)
        self.members = (ClusterMember(self._client, n, Path("worker.log")) for n in range(len(actors)))


CREWS = {"local": ScriptedLocal, "ray": ScriptedOnRay}


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
def run(write_config, tmp_path: Path, crew: str):
    """Carry out an order of so many shards with these members; what was heard."""
    config = load_config(write_config(execution={"watchdog_minutes": 1e-9}))

    def run(*members: Scripted, shards: int = 2, size: int = 1, watched: bool = False) -> Heard:
        execution = config.execution if watched else config.execution.model_copy(update={"watchdog_minutes": 0})
        workers = CREWS[crew](tmp_path, members)
        workers.size_ = size
        ranges = {n: ShardRange(index=n, start=n, stop=n + 1) for n in range(shards)}
        order = Order(SPEC, 0, config, tmp_path, tmp_path, "f", {}, {}, ranges)
        heard = Heard()
        Pool(workers, execution, StopSignals()).run(order, None, heard.reports())
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


@over_both_crews
def test_what_a_member_offered_before_it_died_counts_and_only_what_it_held_is_made_again(run, part):
    first = Scripted([[Want()], [Offered(part(0)), Want(), "signal 9"]])
    second = Scripted([[Want()], [Offered(part(1)), Want()], [Done()]])
    heard = run(first, second)
    assert heard.offered == [0, 1] and second.taken == [1, None]
    assert first.killed and re.fullmatch(r"a worker died \(signal 9( on here)?\); starting another", *heard.notes)


@over_both_crews
def test_a_part_of_a_member_that_does_not_hold_the_shard_is_not_committed_and_its_files_go(run, part, tmp_path):
    late = part(0)
    member = Scripted([[Offered(late), Want()], [Offered(part(0)), Want()], [Done()]])
    heard = run(member, shards=1)
    assert heard.offered == [0]
    assert len(list(tmp_path.glob("*.parquet"))) == 1, "only the files of the one that was offered by its holder"
    assert not (tmp_path / late.moves[0][0]).exists()


@over_both_crews
def test_a_member_that_says_nothing_of_use_for_too_long_is_replaced(run, part):
    silent = Scripted([[Want(), Advanced(0, {"tokens_per_s": 1.0})], []])
    other = Scripted([[Want(), Offered(part(0)), Want(), Done()]])
    heard = run(silent, other, shards=1, watched=True)
    assert silent.killed and heard.offered == [0] and "watchdog" in heard.notes[0]


@over_both_crews
def test_members_that_keep_hanging_end_the_run(run):
    silent = [Scripted([[Want()], []]) for _ in range(3)]
    with pytest.raises(
        UserError, match=r"the last by the watchdog.*execution\.watchdog_minutes.*same command continues"
    ):
        run(*silent, watched=True)
    assert all(worker.killed for worker in silent)


@over_both_crews
def test_members_that_die_without_finishing_anything_end_the_run(run):
    with pytest.raises(UserError, match=r"3 worker processes died.*exit code 1.*same command continues"):
        run(*(Scripted([[Want(), "exit code 1"]]) for _ in range(3)))


@over_both_crews
def test_a_member_that_forgets_a_shard_is_a_defect(run):
    with pytest.raises(StageFailed, match="taken but not returned"):
        run(Scripted([[Want(), Want(), Done()]]))


@over_both_crews
def test_what_memory_allowed_one_member_holds_for_the_next(run, part):
    first = Scripted([[Want(), Limited({"engine.batch_size": 4}), "signal 9"]])
    second = Scripted([[Want(), Offered(part(0)), Want(), Done()]])
    run(first, second, shards=1)
    order = next(message for message in second.told if isinstance(message, Order))
    assert order.limits == {"engine.batch_size": 4}


@over_both_crews
def test_idle_members_are_all_told_to_leave_before_any_is_waited_for(write_config, tmp_path, crew):
    config, told_at_the_end = load_config(write_config()), []

    class Polite(Scripted):
        def kill(self) -> None:
            told_at_the_end.append(sum(isinstance(message, Leave) for message in [*one.told, *other.told]))

    one, other = Polite([["exit code 0"]]), Polite([["exit code 0"]])
    pool = Pool(CREWS[crew](tmp_path, (one, other)), config.execution, StopSignals())
    order = Order(SPEC, 0, config, tmp_path, tmp_path, "f", {}, {}, {})
    pool._seats = [pool._start(_Job(order, Heard().reports(), deque(), 2)) for _ in range(2)]
    pool._dismiss()
    assert told_at_the_end == [2, 2]


@pytest.mark.parametrize("crew", ["ray"])
def test_members_without_room_are_not_waited_for_once_nothing_is_left(run, part):
    waiting = Scripted([], place="")
    first = Scripted([[Want()], [Offered(part(0)), Want()], [Offered(part(1)), Want()], [Done()]])
    heard = run(first, waiting, size=2)
    assert heard.offered == [0, 1] and waiting.killed and heard.joined == ["here"]


@pytest.mark.parametrize("crew", ["ray"])
def test_members_that_wait_for_room_have_no_share_of_what_is_divided(run, part, monkeypatch):
    """engine.requests_per_minute. One that may only be starting has: it might send at once."""
    work = [[Want()], [Offered(part(0)), Want()], [Offered(part(1)), Want()], [Done()]]
    shares = {}
    for seconds in (30.0, -1.0):
        monkeypatch.setattr("pipeline.pool._STARTING_SECONDS", seconds)
        member = Scripted(work)
        run(member, Scripted([], place=""), size=2)
        shares[seconds] = [m.share for m in member.told if isinstance(m, Assigned)]
    assert set(shares[30.0]) == {Share(0, 2)} and set(shares[-1.0]) == {Share(0, 1)}


@pytest.mark.parametrize("crew", ["ray"])
def test_members_that_wait_for_room_are_no_dead_ones_and_are_spoken_of(run, part, monkeypatch):
    """Whatever execution.watchdog_minutes is: it had nothing to do."""
    monkeypatch.setattr("pipeline.pool._PATIENT_SECONDS", -1.0)
    waiting = [Scripted([], place="") for _ in range(4)]
    working = Scripted([[Want(), Offered(part(n))] for n in range(5)] + [[Want(), Done()]])
    real = Pool._hangs
    monkeypatch.setattr(Pool, "_hangs", lambda pool, seat: real(pool, seat) if seat.member.place == "" else "")
    heard = run(working, *waiting, shards=5, size=5, watched=True)
    assert heard.offered == list(range(5)) and heard.notes[-1] == "4 of 5 worker(s) wait for room on the cluster"


@pytest.mark.parametrize("crew", ["ray"])
def test_a_stop_does_not_wait_for_members_that_have_no_room(write_config, tmp_path, crew):
    config, signals, waiting = load_config(write_config()), StopSignals(), Scripted([], place="")
    workers = CREWS[crew](tmp_path, [waiting])
    workers.size_ = 1
    signals.asked = signal.SIGTERM
    ranges = {0: ShardRange(index=0, start=0, stop=1)}
    order = Order(SPEC, 0, config, tmp_path, tmp_path, "f", {}, {}, ranges)
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        Pool(workers, config.execution, signals).run(order, None, Heard().reports())
    assert waiting.killed and time.monotonic() - begun < config.execution.grace_seconds / 2


@pytest.mark.parametrize("crew", ["ray"])
def test_what_keeps_a_worker_from_starting_is_heard_and_ends_the_run(run):
    """Ray says why; it is no loss of a node, however often it comes."""
    failing = [Scripted([[MemberDied("")]], place="") for _ in range(3)]
    with pytest.raises(
        UserError, match=r"3 worker processes died.*what Ray says before it had started: No module named 'pipeline'"
    ):
        run(*failing)


@over_both_crews
def test_an_idle_member_takes_over_before_a_new_one_is_started(run, part):
    dying = Scripted([[Want()], [], [], ["signal 9"]])
    idle = Scripted(
        [[Want()], [Offered(part(1)), Want()], [Done()], [], [Want()], [Offered(part(0)), Want()], [Done()]]
    )
    heard = run(dying, idle, size=2)  # a third would be an error: there is none
    assert sorted(heard.offered) == [0, 1] and idle.taken == [1, None, 0, None]


@pytest.mark.parametrize("crew", ["ray"])
def test_members_that_go_with_one_node_are_one_death(run, part):
    lost = [Scripted([[Want()], [MemberDied("the loss of its node", counts=not n)]]) for n in range(4)]
    last = Scripted([[Want()], *([Offered(part(n)), Want()] for n in range(4)), [Done()]])
    heard = run(*lost, last, shards=4)
    assert heard.offered == [0, 1, 2, 3]


@over_both_crews
def test_a_crew_that_grows_gives_more_members_while_the_stage_runs(write_config, tmp_path, part, monkeypatch, crew):
    monkeypatch.setattr("pipeline.pool._COUNT_SECONDS", 0.0)
    config = load_config(write_config())
    slow = Scripted([[Want()], [], [], [Offered(part(0)), Want()], [Done()]])
    joined = Scripted([[Want()], [Offered(part(1)), Want()], [Done()]], place="a node that joined")
    workers = CREWS[crew](tmp_path, (slow, joined))
    counts = iter([1, 1, 2])
    workers.size = lambda order: next(counts, 2)  # type: ignore[method-assign]
    ranges = {n: ShardRange(index=n, start=n, stop=n + 1) for n in range(2)}
    heard = Heard()
    Pool(workers, config.execution, StopSignals()).run(
        Order(SPEC, 0, config, tmp_path, tmp_path, "f", {}, {}, ranges), None, heard.reports()
    )
    assert sorted(heard.offered) == [0, 1] and heard.joined == ["here", "a node that joined"]
    shares = [[m.share for m in one.told if isinstance(m, Order | Assigned)] for one in (slow, joined)]
    assert shares[0][0] == Share(0, 1) and shares[0][-1] == Share(0, 2), "it hears of the other with its next shard"
    assert set(shares[1]) == {Share(1, 2)}
