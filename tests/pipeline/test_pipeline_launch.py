"""The same command on several machines: the shipped scripts for Slurm and Kubernetes, with two "nodes" on this one and fake stages. They differ in
how they set torchrun's variables: one of them goes on to train."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import data
import pipeline.loop
from pipeline.config_file import load_config
from pipeline.console import Display
from pipeline.launch import Launch, launch_of
from pipeline.selection import Selection
from schemas.config import RunConfig
from schemas.errors import UserError
from tests.cluster_support import free_port, wait_until
from tests.faults.inline import InlineExecutor, fake_pipeline

SCRIPTS = Path(data.__file__).parent / "launch"
FAKE_MAIN = Path(__file__).parents[1] / "faults" / "fake_main.py"
_CONFIG = {
    "name": "t",
    "languages": {"seen": ["en", "de"]},
    "model": {"policy": "x"},
    "prompts": {"sources": [{"path": "x"}], "max_chars": 4},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a config, and a `bin` that stands for an installed pipeline and for Slurm's commands."""
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(_CONFIG | {"run_dir": str(tmp_path / "runs")}), encoding="utf-8")
    commands = {
        "congrad": f'exec {sys.executable} {FAKE_MAIN} "$@" --set train.processes=1',
        "scontrol": "echo 127.0.0.1; echo 127.0.0.2",
        "srun": 'for n in 0 1; do SLURM_PROCID=$n "$@" & pids="$pids $!"; done; code=0; for p in $pids; do wait $p || code=$?; done;'
        " exit $code",
    }
    (tmp_path / "bin").mkdir()
    for name, line in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
        path.chmod(0o755)
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a command with variables; it is ended with the test, and all it started."""
    started = []

    def start(*command: str, **variables: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"} | variables
        started.append(
            subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_the_script_for_slurm_starts_the_command_on_each_node_as_one_of_all_and_ends_with_the_worst(
    folder, start, monkeypatch
):
    said = folder / "bin" / "congrad"
    said.write_text(
        '#!/bin/bash\necho "$RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*"; exit $((RANK * 3))\n', encoding="utf-8"
    )
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "123456"}
    script = start("bash", str(SCRIPTS / "slurm.sh"), "my.yaml", "--quiet", **job)
    out, _ = script.communicate(timeout=100)
    assert script.returncode == 3
    nodes = sorted(line.split() for line in out.splitlines())
    assert [node[0] for node in nodes] == ["0", "1"] and nodes[0][1:] == nodes[1][1:]
    assert nodes[0][1:7] == ["2", "127.0.0.1", "23456", "run", "my.yaml", "--quiet"]
    settings = [f"{key}={value}" for key, value in (pair.split("=") for pair in nodes[0][8::2])]
    for rank, *values in nodes:
        for name, value in zip(("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), values, strict=False):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("RANK", rank)
        assert launch_of(load_config(folder / "my.yaml", settings)) == Launch(int(rank), 2)


@pytest.mark.parametrize(("ends", "code", "requeued"), [("notice", 143, True), ("error", 1, False), ("done", 0, False)])
def test_the_job_for_one_machine_under_slurm_passes_the_notice_on_and_goes_back_to_the_queue(
    folder, start, ends, code, requeued
):
    """The script of docs/slurm.md. Slurm's notice reaches the script alone."""
    waits = "trap 'exit 143' TERM; touch begun; while true; do sleep 0.05; done"
    for name, line in (("congrad", {"notice": waits}.get(ends, f"exit {code}")), ("scontrol", 'echo "$@" > told')):
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
        (folder / "bin" / name).chmod(0o755)
    (text,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", (SCRIPTS.parents[1] / "docs/slurm.md").read_text(), re.DOTALL)
    assert "#SBATCH --signal=B:TERM@" in text
    (folder / "job.sh").write_text(text, encoding="utf-8")
    job = start("bash", "job.sh", SLURM_JOB_ID="7")
    if ends == "notice":
        wait_until((folder / "begun").exists)
        job.send_signal(signal.SIGTERM)
    assert job.wait(60) == code
    assert ((folder / "told").read_text() if requeued else not (folder / "told").exists()) in ("requeue 7\n", True)


def test_the_job_for_kubernetes_trains_over_its_pods_and_a_pod_that_is_lost_ends_all(folder, start):
    _, job = yaml.safe_load_all((SCRIPTS / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]} | {"MASTER_ADDR": "127.0.0.1"}
    variables |= {"MASTER_PORT": str(free_port()), "FAKE_STEPS": "400", "FAKE_SECONDS": "0.05"}
    assert int(variables["WORLD_SIZE"]) == job["spec"]["completions"] == job["spec"]["parallelism"]

    with fake_pipeline():  # the stages before, as docs/scale.md says
        InlineExecutor.computed = []
        pipeline.loop.run(load_config(folder / "my.yaml"), Selection(last="select"), Display(quiet=True))
    first, second = (start(*container["command"], **variables, JOB_COMPLETION_INDEX=str(n)) for n in range(2))
    checkpoint = folder / "runs" / "t" / "round-0" / "train" / "checkpoint"
    wait_until(lambda: checkpoint.exists() and checkpoint.read_text().isdigit())
    os.killpg(second.pid, signal.SIGKILL)
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 1 and "process 1 of the 2 that train together on" in out and "Traceback" not in out


def config_of(**train: object) -> RunConfig:
    return RunConfig.model_validate(_CONFIG | {"run_dir": "runs", "train": train})


@pytest.mark.parametrize(
    ("variables", "nodes", "said"),
    [
        ({"WORLD_SIZE": "2"}, 0, "RANK, MASTER_ADDR, MASTER_PORT are missing"),
        ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 0, "no numbers"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 3, "3 and the launcher started 2"),
        ({"WORLD_SIZE": "2", "RANK": "²", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 0, "no numbers"),
        ({"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 0, "RANK=5, WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, 0, "MASTER_PORT=99999"),
        (
            {"WORLD_SIZE": "8", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "4"},
            0,
            "4 processes a machine",
        ),
    ],
)
def test_a_launch_that_does_not_fit_is_refused(monkeypatch, variables, nodes, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        launch_of(config_of(nodes=nodes))


def test_a_launcher_counts_only_where_the_config_trains_on_several_machines(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch_of(config_of()) is None
    assert launch_of(config_of(nodes=2)) == Launch(1, 2)
    monkeypatch.delenv("WORLD_SIZE")
    assert launch_of(config_of(nodes=2)) is None


def test_several_machines_for_a_command_that_was_started_on_one_are_refused_before_any_work(folder, start):
    for more in ((), ("--dry-run",)):
        run = start("congrad", "run", "my.yaml", "--set", "train.nodes=2", *more)
        out, _ = run.communicate(timeout=60)
        assert run.returncode == 1 and "this command was started on one" in out, out
    events = folder / "runs" / "t" / "events.jsonl"
    assert not events.exists() or not [
        e for e in map(json.loads, events.read_text().splitlines()) if e["event"] == "part_done"
    ]
