"""What is said between machines: are they alike, do they see what was written, what a gang on a cluster is to the pool. No Ray."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

import pyarrow as pa
import pytest

import pipeline.ray_member
from pipeline.cluster import Cluster, _Seen
from pipeline.commit import PartBuilder, PreparedPart
from pipeline.crew import MemberDied
from pipeline.machine import Listening
from pipeline.messages import Done, Leave, Offered, Order, Refused
from pipeline.node_host import Died, Placed
from pipeline.probe import Look, look, probe_in, refuse_others, versions
from pipeline.ray_gang import RayGang
from pipeline.ray_member import RayMember
from pipeline.rundir import RunDir
from pipeline.settled import settled_order
from schemas.errors import UserError
from schemas.tables import TABLES
from stages.catalog import BY_NAME
from stages.contract import MachineLost


def test_a_machine_that_reads_another_folder_or_runs_other_versions_is_refused_by_name(tmp_path):
    with probe_in(tmp_path) as (probe, expected):
        mine = look(probe)
        refuse_others({"b": mine}, mine, expected, tmp_path)
        blind = look(tmp_path / "elsewhere" / probe.name)
        with pytest.raises(UserError, match=r"Node b does not see the run directory.*\(No such file or directory\)"):
            refuse_others({"a": mine, "b": blind}, mine, expected, tmp_path)
        other = Look(mine.versions | {"torch": "0.1"}, mine.probe, 1.0, 1)
        with pytest.raises(
            UserError, match=r"Node c has other versions than where the run was started: torch 0\.1 \(there"
        ):
            refuse_others({"c": other}, mine, expected, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cluster_whose_head_is_lost_is_said_and_not_waited_for():
    cluster = Cluster.__new__(Cluster)
    cluster._address, cluster._seen = "head:1", _Seen([], time.monotonic() - 21)
    with pytest.raises(UserError, match=r"no longer answers \(nothing for 20 s\)") as error:
        cluster.nodes()
    assert "the same command continues" in error.value.fix


class Ray:
    """What RayMember asks of Ray: the words are there, or the actor is gone."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self) -> None:
        self.words: list[object] = []

    def wait(self, references, num_returns=1, timeout=0.0):
        return references, []

    def get(self, reference):
        said, self.words = self.words, []
        return said

    def kill(self, actor) -> None: ...


class FakeCluster:
    answers = True

    def __init__(self) -> None:
        self.ray = Ray()

    def name_of(self, node_id: str) -> str:
        return f"node-{node_id}"

    def address_of(self, node_id: str) -> str:
        return "10.0.0.2"


class Actor:
    """Calls of any method, remembered."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def __getattr__(self, method: str) -> Actor:
        return self

    def options(self, **options: object) -> Actor:
        return self

    def remote(self, *arguments: object) -> object:
        self.calls.append(arguments)
        return object()


@pytest.fixture
def part(tmp_path) -> PreparedPart:
    (tmp_path / "_tmp").mkdir()
    builder = PartBuilder(RunDir(tmp_path), BY_NAME["generate"], 0, 3, "f", tmp_path / "_tmp")
    builder.write("candidates", pa.table(TABLES["candidates"].schema.empty_table()))
    return builder.finish([], [], {}, 0.0)


@pytest.mark.parametrize("seen", ["late", "never", "another"])
def test_a_part_that_another_machine_wrote_is_waited_for_by_its_hash_and_not_for_ever(
    tmp_path, part, seen, monkeypatch
):
    monkeypatch.setattr(pipeline.ray_member, "VISIBLE_SECONDS", 3.0 if seen == "late" else 0.2)
    cluster = FakeCluster()
    member = RayMember(cluster, Actor(), tmp_path / "log", tmp_path, set())
    hidden = [tmp_path / temporary for temporary, _ in part.moves]
    assert hidden
    content = hidden[0].read_bytes()
    hidden[0].unlink()
    if seen == "late":
        threading.Timer(0.3, hidden[0].write_bytes, [content]).start()
    elif seen == "another":
        hidden[0].write_bytes(b"\0" * len(content))
    cluster.ray.words = [Placed("a", ()), Offered(part)]
    if seen == "late":
        assert list(member.received()) == [Offered(part)]
    else:
        with pytest.raises(MemberDied, match="was not seen whole here"):
            list(member.received())


@dataclass
class Room:
    given_back: bool = False

    def give_back(self) -> None:
        self.given_back = True


@pytest.fixture
def order(tmp_path) -> Order:
    return Order(BY_NAME["train"], 0, None, tmp_path, tmp_path / "_tmp", "f", {}, {}, {})


@pytest.fixture
def gang(tmp_path):
    clusters, actors = [FakeCluster() for _ in range(3)], [Actor() for _ in range(3)]
    first, *others = (
        RayMember(cluster, actor, tmp_path / f"{n}.log", tmp_path, set())
        for n, (cluster, actor) in enumerate(zip(clusters, actors, strict=True))
    )
    found = RayGang(Room(), first, others, b"key", lambda: None)
    found.rays, found.actors = [cluster.ray for cluster in clusters], actors
    return found


def test_the_first_of_a_gang_gets_its_order_once_all_others_offer_seats(gang, order):
    gang.send(order)
    gang.rays[1].words = [Placed("b", ("0",)), Listening(11, versions())]
    assert list(gang.received()) == [] and not gang.place
    assert not [call for call in gang.actors[0].calls if call]
    gang.rays[2].words, gang.rays[0].words = [Placed("c", ()), Listening(12, versions())], [Placed("a", ()), Done()]
    assert list(gang.received()) == [Done()]
    assert gang.place == "node-a + node-b GPU 0 + node-c"
    ((sent,),) = [call for call in gang.actors[0].calls if call]
    assert [(m.name, m.address, m.key) for m in sent.machines] == [
        ("node-b GPU 0", ("10.0.0.2", 11), b"key"),
        ("node-c", ("10.0.0.2", 12), b"key"),
    ]
    gang.send(Leave())
    assert gang.actors[0].calls[-2:] and (Leave(),) in gang.actors[0].calls
    assert "key" not in repr(sent.machines)


def test_a_machine_of_a_gang_that_runs_other_versions_is_refused_by_name(gang, order):
    gang.send(order)
    gang.rays[1].words = [Placed("b", ("0",)), Listening(11, versions() | {"torch": "0.1"})]
    with pytest.raises(UserError, match=r"Node node-b GPU 0 has other versions .* torch 0\.1 \(there"):
        list(gang.received())


def test_an_order_of_a_run_of_other_versions_is_refused_where_it_arrives(order):
    """A node that joined after the run had compared those there were."""
    assert settled_order(replace(order, versions=versions())).root == order.root
    with pytest.raises(UserError, match=r"other versions than where the run was started: torch .* \(there 0\.1\)"):
        settled_order(replace(order, versions=versions() | {"torch": "0.1"}))


def test_one_that_dies_is_the_death_of_its_gang_and_its_room_is_given_back(gang, order):
    gang.send(order)
    gang.rays[2].words = [Placed("c", ()), Died("signal 9")]
    with pytest.raises(MemberDied, match="signal 9 on node-c"):
        list(gang.received())
    gang.kill()
    assert gang._room.given_back


def test_a_machine_whose_loss_the_first_noticed_is_a_death_that_is_mended(gang):
    gang.rays[0].words = [Placed("a", ()), Refused(MachineLost("process 1 on b died", where="x", fix="y"))]
    with pytest.raises(MemberDied, match="process 1 on b died"):
        list(gang.received())


def test_a_gang_that_waits_for_nodes_that_are_gone_ends_in_words(gang, order):
    def gone() -> None:
        raise UserError("too few nodes")

    gang._still_there, gang._asked = gone, time.monotonic() - 6
    gang.send(order)
    with pytest.raises(UserError, match="too few nodes"):
        list(gang.received())
