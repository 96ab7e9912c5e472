"""The demo's config, smaller: real vLLM, a real model, every stage, killed in generate on the way (other stages: test_e2e_kills.py)."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import polars as pl
import psutil
import pytest
import yaml

from schemas.manifests import StageManifest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        platform.system() != "Linux" or platform.machine() != "x86_64", reason="vLLM is installed on Linux x86_64"
    ),
]

STAGES = ["prompts", "generate", "judge", "pairs", "gradients", "conflict", "select", "train", "evaluate"]
SEEN, UNSEEN = ["en", "de", "hi"], ["th"]


def config_of(folder: Path) -> Path:
    """The demo with three languages and one unseen, four tasks each, small shards and two training steps."""
    config = yaml.safe_load(files("data").joinpath("configs/demo.yaml").read_text(encoding="utf-8"))
    config |= {"name": "real", "run_dir": str(folder / "runs"), "languages": {"seen": SEEN, "unseen": UNSEEN}}
    config["prompts"]["sources"][0]["limit"] = 4
    config["generate"] |= {"shard_size": 4, "sampling": {"temperature": 0.8, "max_tokens": 24}}
    config["engine"]["max_num_seqs"] = 8  # so that shards end one after the other
    config["judge"]["shard_size"] = 20
    config["gradients"]["shard_size"] = 3
    config["train"] |= {"max_steps": 2, "epochs": 1.0, "save_steps": 1, "batch_size": 2}
    config["evaluate"] |= {"pairs_per_language": 2, "sampling": {"temperature": 0.0, "max_tokens": 16}}
    config["evaluate"]["authored"][0]["limit"] = 2
    if "PYTEST_XDIST_WORKER" in os.environ:
        config["execution"] = {"threads": 1}  # the other core is another worker's
    path = folder / "real.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def start(path: Path) -> subprocess.Popen[bytes]:
    with (path.parent / "out.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "pipeline", "run", str(path)], stdout=log, stderr=log)


def events(root: Path) -> list[dict]:
    path = root / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kill_after_a_part(path: Path, root: Path) -> dict[Path, bytes]:
    """Run until a part of generate is committed, SIGKILL the driver; the stage's files at that instant."""
    driver = start(path)
    while driver.poll() is None and not any(
        e["event"] == "part_done" and e["stage"] == "generate" for e in events(root)
    ):
        time.sleep(0.05)
    assert driver.poll() is None, (path.parent / "out.log").read_text()[-3000:]
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, "workers and the vLLM engine end with the driver"
    assert not (root / "round-0/_state/generate/_stage.json").exists()
    return {p: p.read_bytes() for p in (root / "round-0" / "candidates").glob("part-*.parquet")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[Path, bytes]]:
    """(config, run directory, parts that were committed when the run was killed)."""
    folder = tmp_path_factory.mktemp("real")
    path, root = config_of(folder), folder / "runs/real"
    committed = kill_after_a_part(path, root)
    last = start(path)
    assert last.wait() == 0, (folder / "out.log").read_text()[-4000:]
    return path, root, committed


def test_nothing_committed_was_done_again_and_no_row_is_lost_or_doubled(run) -> None:
    _, root, committed = run
    assert committed and all(path.read_bytes() == content for path, content in committed.items())
    prompts = pl.read_parquet(root / "prompts/*.parquet")
    candidates = pl.read_parquet(root / "round-0/candidates/*.parquet")
    assert candidates["candidate_id"].is_unique().all()
    assert set(candidates["prompt_id"]) == set(prompts["prompt_id"])
    assert set(candidates.group_by("prompt_id").len()["len"]) == {3}
    pairs, gradients = (pl.read_parquet(root / f"round-0/{t}/*.parquet") for t in ("pairs", "gradients"))
    assert sorted(gradients["pair_id"]) == sorted(pairs.filter(pl.col("split") == "train")["pair_id"])
    manifests = [StageManifest.model_validate_json(p.read_text()) for p in root.rglob("_stage.json")]
    assert {m.stage for m in manifests} == set(STAGES)
    for tally in (tally for m in manifests for tally in m.tallies):
        assert tally.rows_in == tally.kept + sum(tally.dropped.values()) + tally.failed


def test_the_model_answers_in_the_language_of_the_prompt_and_the_judge_answers_with_a_score(run) -> None:
    """A broken template, tokenizer or engine shows here: a real instruct model does both, most of the time."""
    _, root, _ = run
    candidates = pl.read_parquet(root / "round-0/candidates/*.parquet")
    assert (candidates["detected_language"] == candidates["language"]).mean() > 0.7
    assert candidates["text"].str.contains(r"<\|im_").sum() == 0
    judgements = pl.read_parquet(root / "round-0/judgements/*.parquet")
    assert judgements["mass"].mean() > 0.5
    assert judgements["score"].is_between(0, 5).all() and judgements["score"].n_unique() > 10


def test_training_moved_the_model_towards_the_chosen_answers(run) -> None:
    _, root, _ = run
    metrics = pl.read_parquet(root / "round-0/metrics/*.parquet")
    assert metrics["step"].max() == 2
    evaluation = pl.read_parquet(root / "round-0/evaluation/*.parquet")
    change = evaluation.filter((pl.col("metric") == "logp_chosen_change") & (pl.col("language") == "all"))
    assert change["value"].abs().max() > 0
    answers = pl.read_parquet(root / "round-0/answers/*.parquet")
    assert set(answers["model"]) == {"before", "after"} and set(answers["language"]) >= set(SEEN)


def test_the_second_command_says_up_to_date(run) -> None:
    path, root, _ = run
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", str(path)], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0 and "Up to date" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before
