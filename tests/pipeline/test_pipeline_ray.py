"""A run over a real Ray cluster of three nodes on this machine: the same bytes as on this machine alone, whatever dies."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
import yaml

from schemas.errors import UserError
from tests.cluster_support import ThreeNodes, free_port, start_driver, wait_until

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
def nodes(module_environment):
    module_environment.setenv("FAKE_SECONDS", "0.4")
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

    def start(*overrides: str):
        started.append(start_driver(config, *overrides))
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
    folder = tmp_path_factory.mktemp("alone")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(_CONFIG | {"run_dir": str(folder / "runs")}), encoding="utf-8")
    finish(start_driver(path, "execution.workers=2"))
    return tables(folder / "runs" / "t")


def test_a_node_that_is_killed_costs_its_shards_and_one_that_joins_works_along(nodes, config, start, alone):
    root = config.parent / "runs" / "t"
    driver = start(*on_ray(nodes))
    wait_until(lambda: len({e["place"] for e in events(root, "part_done") if e["stage"] == "generate"}) == 2)
    nodes.strike("b", signal.SIGKILL)
    nodes.add("c")
    said = finish(driver)
    assert tables(root) == alone
    begun = Counter(e["part"] for e in events(root, "part_started") if e["stage"] == "generate")
    done = Counter(e["part"] for e in events(root, "part_done") if e["stage"] == "generate")
    assert len(done) == _PARTS and set(done.values()) == {1}
    assert sum(begun.values()) <= _PARTS + 1, "only what the lost node held was begun again"
    assert "node-c" in {e["place"] for e in events(root, "worker_started")}
    assert any("node-b" in e["message"] for e in events(root, "note"))
    assert not said, "Ray's own words stay out of the terminal"
    assert all((root / "logs" / e["log"]).is_file() for e in events(root, "worker_started"))


def test_a_driver_that_is_killed_leaves_a_run_that_the_same_command_continues(nodes, config, start, alone):
    root = config.parent / "runs" / "t"
    driver = start(*on_ray(nodes))
    wait_until(lambda: len([e for e in events(root, "part_done") if e["stage"] == "generate"]) >= 3)
    driver.kill()
    driver.communicate()
    committed = len(list((root / "round-0" / "_state" / "generate").glob("part-*.json")))
    finish(start(*on_ray(nodes)))
    assert tables(root) == alone
    assert len(events(root, "part_done")) <= 3 + _PARTS + 1, "nothing that was committed is made again"
    assert committed < _PARTS


def test_where_no_cluster_answers_the_run_is_refused_in_seconds(start):
    driver = start("execution.on=ray", f"execution.ray_address=127.0.0.1:{free_port()}")
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 1 and "No Ray cluster answers" in err and "Traceback" not in err


@pytest.mark.parametrize("address", ["local", "ray://head:10001", "", "head", "head:x"])
def test_an_address_for_which_ray_would_start_a_cluster_or_a_proxy_is_refused(address):
    from pipeline.cluster import Cluster

    with pytest.raises(UserError, match="no address of a Ray cluster"):
        Cluster(address)
