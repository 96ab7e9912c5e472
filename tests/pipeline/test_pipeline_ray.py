"""A run over a real Ray cluster of three nodes on this machine: the same bytes as on this machine alone, whatever dies."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pipeline.cluster import Node, _not_connected
from pipeline.ray_sizes import Sizes
from schemas import files
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.catalog import BY_NAME
from tests.cluster_support import ThreeNodes, free_port, start_driver, wait_until
from tests.faults.inline import FakeRun, fake_pipeline

pytest.importorskip("ray", reason="Ray is not installed (extra [ray])")
_CONFIG = {
    "name": "t",
    "languages": {"seen": ["en", "de"]},
    "model": {"policy": "x"},
    "prompts": {"sources": [{"path": "x"}], "max_chars": 36},
    "generate": {"shard_size": 3},
}
_PARTS = 12


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> Path:
    """What the stages of all nodes look at."""
    return tmp_path_factory.mktemp("flags")


@pytest.fixture(scope="module")
def nodes(module_environment, flags):
    module_environment.setenv("FAKE_SECONDS", "0.4")
    module_environment.setenv("FAKE_DIR", str(flags))
    cluster = ThreeNodes()
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def module_environment():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(_CONFIG | {"run_dir": str(tmp_path / "runs")}), encoding="utf-8")
    return path


def on_ray(nodes: ThreeNodes) -> tuple[str, str]:
    return "execution.on=ray", f"execution.ray_address={nodes.address}"


def events(root: Path, kind: str) -> list[dict]:
    path = root / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def tables(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.parquet"))}


@pytest.fixture
def start(config):
    """Start the command on the config; it is ended with the test."""
    started = []

    def start(*overrides: str, more: tuple[str, ...] = ()):
        started.append(start_driver(config, *overrides, more=more))
        return started[-1]

    yield start
    for driver in started:
        driver.kill()
        driver.communicate()


def finish(driver) -> str:
    out, err = driver.communicate(timeout=200)
    assert driver.returncode == 0, out + err
    return out + err


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, bytes]:
    """What a run on this machine writes."""
    with fake_pipeline():
        run = FakeRun(tmp_path_factory.mktemp("alone"), _CONFIG)
        run()
    return tables(run.root)


def test_a_node_that_is_killed_costs_its_shards_and_one_that_joins_works_along(nodes, config, start, alone, flags):
    root = config.parent / "runs" / "t"
    driver = start(*on_ray(nodes), more=("--until", "generate"))
    wait_until(lambda: len({e["place"] for e in events(root, "part_done") if e["stage"] == "generate"}) == 2)
    (flags / "hold").touch()  # or the node that is left may be done before another has begun
    nodes.strike("b", signal.SIGKILL)
    nodes.add("c")
    wait_until(lambda: "node-c" in {e["place"] for e in events(root, "worker_started")})
    (flags / "hold").unlink()
    said = finish(driver)
    assert tables(root) == {name: content for name, content in alone.items() if "curated" not in name}
    begun = [(e["part"], e["place"]) for e in events(root, "part_started") if e["stage"] == "generate"]
    done = [(e["part"], e["place"]) for e in events(root, "part_done") if e["stage"] == "generate"]
    assert sorted(part for part, _ in done) == list(range(_PARTS))
    notes = [e["message"] for e in events(root, "note")]
    lost = {place for _, place in begun for note in notes if "a worker died" in note and place in note}
    held = Counter(
        part for part, place in set(begun) - set(done) if place in lost
    )  # the word of one that is done may be lost too
    again = Counter(part for part, _ in begun) - Counter(range(_PARTS))
    assert "node-b" in lost and again == held, f"only what a lost worker held was begun again: {begun}, {notes}"
    assert "node-c" in {e["place"] for e in events(root, "part_done") if e["stage"] == "generate"}
    assert any("node-b" in note for note in notes)
    assert not said, "Ray's own words stay out of the terminal"
    assert all((root / "logs" / e["log"]).is_file() for e in events(root, "worker_started"))


def test_a_second_driver_is_refused_and_after_the_first_was_killed_it_goes_on_to_a_training_with_a_seat_on_each_node(
    nodes, config, start, alone
):
    root = config.parent / "runs" / "t"
    driver = start(*on_ray(nodes))
    wait_until((root / "_lease.json").exists)
    refused(start(*on_ray(nodes)), f"host {socket.gethostname()}, process {driver.pid} holds it")
    wait_until(lambda: len([e for e in events(root, "part_done") if e["stage"] == "generate"]) >= 3)
    driver.kill()
    driver.communicate()
    committed = len(list((root / "round-0" / "_state" / "generate").glob("part-*.json")))
    finish(start(*on_ray(nodes), "train.nodes=0"))
    assert tables(root) == alone
    done = Counter((e["stage"], e["part"]) for e in events(root, "part_done"))
    assert set(done.values()) == {1}, "nothing that was committed is made again"
    assert committed < _PARTS
    assert (root / "round-0" / "train" / "result.txt").read_text() == "fresh by 2"
    (place,) = [e["place"] for e in events(root, "part_done") if e["stage"] == "train"]
    assert place.count("node-") == 2 and " + " in place
    assert len(list((root / "logs").glob("worker-*-node-1.log"))) == 1


def refused(driver, words: str) -> None:
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 1 and len(err.splitlines()) == 1, err
    assert "Another run is working in this directory" in err and words in err


def test_a_second_driver_is_refused_within_a_heartbeat_where_the_first_is_on_another_machine(config, start):
    """Before it looks for a cluster: its address is none."""
    root, over = config.parent / "runs" / "t", threading.Event()
    root.mkdir(parents=True)
    holder = {"host": "elsewhere", "space": "another boot", "pid": 1, "started": 1, "nonce": "x"}

    def beat(number: int) -> None:
        files.write_text(root / "_lease.json", json.dumps(holder | {"beat": number, "heartbeat": 0.0}))

    def live() -> None:
        number = 0
        while not over.wait(0.3):
            beat(number := number + 1)

    beat(0)
    first = threading.Thread(target=live)
    first.start()
    try:
        refused(start("execution.on=ray", "execution.ray_address=127.0.0.1:1"), "host elsewhere, process 1 holds it")
    finally:
        over.set()
        first.join()


def test_a_dry_run_is_refused_as_the_run_where_no_cluster_answers(config):
    said = set()
    port = free_port()
    for more in ((), ("--dry-run",)):
        driver = start_driver(config, "execution.on=ray", f"execution.ray_address=127.0.0.1:{port}", more=more)
        _, err = driver.communicate(timeout=60)
        said.add((driver.returncode, err))
    ((code, err),) = said
    assert code == 1 and "No Ray cluster answers" in err and "Traceback" not in err


class _Nodes:
    """A cluster of two nodes with four cores and two GPUs each, and a head without cores."""

    def nodes(self) -> list[Node]:
        return [Node("0", "head", "10.0.0.1", 0.0, 0.0), *(Node(n, n, "10.0.0.2", 4.0, 2.0) for n in "ab")]


@pytest.mark.parametrize(("nodes", "processes", "spans"), [(1, 1, 1), (0, 0, 2), (2, 2, 2), (3, 1, None), (0, 3, 1)])
def test_a_training_spans_the_nodes_that_hold_its_processes_and_more_are_refused_before_any_work(
    nodes, processes, spans
):
    config = RunConfig.model_validate(_CONFIG | {"run_dir": "r", "train": {"nodes": nodes, "processes": processes}})
    sizes = Sizes(_Nodes(), config)
    if spans is None:
        with pytest.raises(
            UserError, match=r"is to run on 3 nodes and 2 of the Ray cluster can take part: each with 2 core"
        ):
            sizes.refuse_too_few([BY_NAME["generate"], BY_NAME["train"]])
    else:
        assert sizes.spanned(BY_NAME["train"]) == spans
        assert sizes.spanned(BY_NAME["generate"]) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": {"processes": 8}}, r"holds a worker of stage train: 4 core\(s\) and 8 GPU\(s\)"),
        ({"execution": {"threads": 64}}, r"holds a worker of stage prompts: 64 core\(s\) and 0 GPU\(s\)"),
        ({"engine": {"tensor_parallel": 4}}, r"holds a worker of stage generate: 4 core\(s\) and 4 GPU\(s\)"),
    ],
)
def test_a_stage_that_no_node_holds_is_refused_before_any_work(settings, words):
    config = RunConfig.model_validate(_CONFIG | {"run_dir": "r"} | settings)
    with pytest.raises(UserError, match=words):
        Sizes(_Nodes(), config).refuse_too_few([BY_NAME[name] for name in ("prompts", "generate", "train")])


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_stage_that_had_gpus_waits_for_gpus_when_their_nodes_are_lost(device):
    nodes = _Nodes()
    sizes = Sizes(nodes, RunConfig.model_validate(_CONFIG | {"run_dir": "r", "execution": {"device": device}}))
    before = sizes.needs(BY_NAME["generate"])
    nodes.nodes = lambda: [Node("c", "c", "10.0.0.3", 32.0, 0.0)]  # type: ignore[method-assign]
    assert before == (2, 1) == sizes.needs(BY_NAME["generate"]) and not sizes.workers(BY_NAME["generate"])


def test_other_versions_of_ray_or_python_are_named():
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as mismatch:
        check_version_info({"ray_version": "1.2.3", "python_version": "3.0.1"}, "node 10.0.0.5")
    said = str(_not_connected("10.0.0.5:6379", mismatch.value))
    assert re.match(
        r"The Ray cluster has Ray 1\.2\.3 and Python 3\.0\.1, this process Ray [\d.]+ and Python [\d.]+ \(", said
    )


@pytest.mark.parametrize("address", ["local", "ray://head:10001", "", "head", "head:x"])
def test_an_address_for_which_ray_would_start_a_cluster_or_a_proxy_is_refused(address):
    from pipeline.cluster import Cluster

    with pytest.raises(UserError, match="no address of a Ray cluster"):
        Cluster(address)
