"""doctor on the tiny model: a line per check, problems said with what to do, exit code 1, nothing left behind."""

from __future__ import annotations

import json
import re
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipeline import doctor_size
from pipeline.cli import app
from pipeline.config_file import load_config
from pipeline.doctor import Doctor
from pipeline.doctor_size import Sizes, needs
from schemas.errors import UserError
from stages.checks.finding import Finding


@pytest.fixture
def write(tmp_path: Path, tiny_model: Path):
    """Write a config for the tiny model; `a__b=1` sets a.b."""

    def make(**changes: Any) -> Path:
        config: dict[str, Any] = {
            "name": "t",
            "run_dir": str(tmp_path / "runs" / "deep"),
            "languages": {"seen": ["en", "de"], "unseen": ["it"]},
            "model": {"policy": str(tiny_model), "dtype": "float32"},
            "text": {"max_length": 1024},
            "engine": {"kind": "transformers"},
            "prompts": {"sources": [{"path": "package:prompts/{language}.jsonl"}]},
            "generate": {"candidates": 2, "sampling": {"max_tokens": 6}},
            "judge": {"min_mass": 0.0},
            "gradients": {"sketch": {"dim": 512}},
            "evaluate": {"sampling": {"max_tokens": 8}},
            "execution": {"device": "cpu", "threads": 1},
        }
        for key, value in changes.items():
            *sections, last = key.split("__")
            target = config
            for section in sections:
                target = target.setdefault(section, {})
            target[last] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return make


def examine(path: Path, quick: bool = True) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in Doctor(load_config(path), quick).run(lambda name: None):
        found.setdefault(finding.check, []).append(finding)
    return found


def test_a_healthy_config_passes_every_check_measured_and_timed(write, tmp_path, capfd):
    result = CliRunner().invoke(app, ["doctor", str(write()), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads(capfd.readouterr().out)
    assert report["ok"] and report["problems"] == 0
    checks = {check["check"]: check for check in report["checks"]}
    order = list(checks)
    assert order == [
        "installation", "packages", "run_directory", "sources", "languages", "device", "model",
        "architecture", "tokenizer", "special_tokens", "end_of_turn", "context", "weights", "batch_invariance", "generate", "judge", "disk",
        "memory", "time",
    ]  # fmt: skip
    assert checks["architecture"]["what"].split(": ")[1].startswith("14 layers, ")
    assert checks["batch_invariance"]["values"]["cosine"] > 0.9999
    assert checks["generate"]["what"].startswith("6 of 6 sample prompts kept")
    assert checks["judge"]["what"].startswith("12 of 12 sample candidates kept")
    assert set(checks["time"]["values"]) == {"generate", "judge", "gradients", "train"}
    assert all(seconds > 0 for seconds in checks["time"]["values"].values())
    assert not (tmp_path / "runs").exists(), "the doctor leaves no run behind"


def test_a_line_per_check_and_exit_code_1_on_problems(write, capfd):
    result = CliRunner().invoke(app, ["doctor", str(write(text__max_length=4000)), "--quick"])
    assert result.exit_code == 1
    lines = capfd.readouterr().out.splitlines()
    wrong = next(line for line in lines if line.startswith("problem"))
    assert "context" in wrong and "4000 exceeds the model's context of 2048" in wrong
    assert lines[lines.index(wrong) + 1].strip().startswith("-> Lower it")
    assert lines[-2] == "1 problems, 0 warnings."


def test_quick_loads_no_weights(write, monkeypatch):
    monkeypatch.setattr("stages.models.load.load_causal_lm", lambda *a, **k: pytest.fail("weights were loaded"))
    found = examine(write())
    assert "weights" not in found and found["time"][0].what.startswith("no estimate")


def test_sources_that_cannot_be_read_name_file_and_remedy(write, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"promt": "x", "language": "en"}\n')
    (found,) = examine(write(prompts__sources=[{"path": str(rows)}]))["sources"]
    assert found.state == "problem" and "rows.jsonl" in found.what and "Did you mean 'promt'" in found.fix
    missing = examine(write(prompts__sources=[{"path": str(tmp_path / "none.jsonl")}]))
    assert missing["packages"][0].state == "problem" and "none.jsonl" in missing["sources"][0].what


def test_without_torch_it_says_what_is_missing_and_still_checks_the_rest(write, monkeypatch):
    import importlib.util

    from pipeline import doctor, preflight

    def find_spec(name: str) -> Any:
        return None if name in ("torch", "transformers", "trl") else importlib.util.find_spec(name)

    monkeypatch.setattr(doctor, "find_spec", find_spec)
    monkeypatch.setattr(preflight, "find_spec", find_spec)
    found = examine(write())
    problems = {finding.what for finding in found["packages"]}
    assert any("generate needs the packages torch, transformers" in what for what in problems)
    assert all("pip install" in finding.fix for finding in found["packages"])
    assert "model" not in found and found["run_directory"][0].state == "ok"


def test_a_surgery_method_without_its_solver_is_found_before_the_run(write, monkeypatch):
    import importlib.util

    from pipeline import preflight

    monkeypatch.setattr(
        preflight, "find_spec", lambda name: None if name == "clarabel" else importlib.util.find_spec("json")
    )
    found = examine(write(conflict__surgery="cagrad"))["packages"]
    (problem,) = [finding for finding in found if finding.state == "problem"]
    assert "conflict: This surgery method needs the packages clarabel (conflict.surgery: cagrad)" in problem.what
    assert "[solvers]" in problem.fix and "pcgrad" in problem.fix


def test_an_unknown_surgery_lists_the_known_ones(write):
    with pytest.raises(UserError, match=r"surgery.*pcgrad.*unit_mean.*nash_mtl"):
        examine(write(conflict__surgery="pcgrda"))


def test_a_model_that_is_not_there_is_a_problem_and_later_checks_are_left_out(write, tmp_path):
    found = examine(write(model__policy=str(tmp_path / "no-model")))
    assert found["model"][0].state == "problem" and "tokenizer" not in found


def test_a_run_directory_that_cannot_be_written_is_a_problem(write, tmp_path):
    (tmp_path / "file").write_text("")
    (found,) = examine(write(run_dir=str(tmp_path / "file" / "runs")))["run_directory"]
    assert found.state == "problem" and "--run-dir" in found.fix


def test_a_check_that_breaks_is_a_problem_of_its_own(write, monkeypatch):
    def broken(config: object) -> None:
        raise RuntimeError("cudaErrorUnknown")

    monkeypatch.setattr("stages.checks.machine.device_findings", broken)
    found = examine(write())
    assert found["device"][0].what == "the check ended with RuntimeError: cudaErrorUnknown"
    assert found["tokenizer"][0].state == "ok"


def test_an_engine_without_memory_is_found_before_the_run(write, monkeypatch):
    import torch

    from stages.engines.transformers import TransformersEngine

    def full(self: object, batch: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TransformersEngine, "run_batch", full)
    found = examine(write(), quick=False)
    assert found["generate"][0].state == "problem" and "do not fit in memory" in found["generate"][0].fix
    assert found["engine"][0].state == "warning" and "engine.batch_size" in found["engine"][0].what


def test_disk_and_memory_are_compared_with_what_there_is(write, monkeypatch):
    config = load_config(write(gradients__sketch={"dim": 8192}))
    sizes = Sizes.of(config, rows=1_000_000, weights=2e9, memory=1e9)
    assert (sizes.candidates, sizes.pairs) == (2_000_000, 850_000)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor_size.shutil, "disk_usage", lambda path: usage(0, 0, 10e9))
    disk, *memory = needs(config, sizes)
    assert disk.state == "problem" and disk.values["gb_per_million_pairs"] == pytest.approx(16.7, abs=0.05)
    assert "10.0 GB free" in disk.what and "gradients.sketch.dim" in disk.fix
    assert [finding.state for finding in memory] == ["problem"] * 3 + ["ok"]
    monkeypatch.setattr(doctor_size.shutil, "disk_usage", lambda path: usage(0, 0, 1e15))
    disk = next(needs(config, sizes))
    assert disk.state == "ok" and "_kept/ holds" not in disk.what
    assert disk.values["kept_bytes_at_most"] == 2 * disk.values["needed_bytes"]


def test_results_that_are_kept_aside_are_counted(write, tmp_path):
    config = load_config(write(execution={"keep_results": 0}))
    sizes = Sizes.of(config, rows=10, weights=0, memory=0)
    assert next(needs(config, sizes)).values["kept_bytes_at_most"] == 0
    for place in ("_kept/prompts/aa/prompts", "round-0/_kept/train/bb/train/model"):
        (config.folder / place).mkdir(parents=True)
        (config.folder / place / "file").write_bytes(b"x" * 3_000_000)
    disk = next(needs(config, sizes))
    assert disk.values["kept_bytes"] == 6_000_000 and "_kept/ holds 6.0 MB made with other settings" in disk.what


def test_objectives_in_sequence_need_copies_of_the_weights(write, monkeypatch):
    """Masters, gradients and both moments are 8 times bfloat16 weights; start and displacement 3 times more; copies on disk."""
    objectives = [{"name": name, "where": f"language = '{name}'"} for name in ("en", "de")]

    def found(**train: object) -> tuple[float, list[str]]:
        config = load_config(write(train=train))
        sizes = Sizes.of(config, rows=10, weights=1e9, memory=10.5e9)
        disk, *memory = needs(config, sizes)
        return float(disk.values["needed_bytes"]), [f.what for f in memory if f.state != "ok"]

    plain, full = found(method="full")
    assert not full
    sequence, more = found(method="full", orthalign={"objectives": objectives})
    assert sequence - plain == pytest.approx((2 * 4 + 3 * 2) * 1e9)
    assert len(more) == 1 and more[0].startswith("train needs about 11.2 GiB")
    adapters = found(method="lora", orthalign={"objectives": objectives})[0] - found(method="lora")[0]
    assert adapters == pytest.approx(3 * 1e9)
    monkeypatch.setattr(doctor_size.psutil, "virtual_memory", lambda: namedtuple("memory", "available")(1.9e9))
    searched = found(method="full", orthalign={"objectives": objectives, "rank": "search"})[1]
    assert any("rank search holds a copy" in what and "1.9 GiB" in what for what in searched)


LAYERS = (("model.layers.0.mlp.up", 10, 20), ("model.layers.1.mlp.up", 30, 20), ("model.layers.1.attn.q", 6, 6))


@pytest.mark.parametrize(
    ("sketch", "per_pair", "sums", "said"),
    [
        ({"dim": 100}, 200, 0, "sketches of 100 numbers"),
        ({"dim": 100, "both_sides": True}, 600, 0, "three sketches of 100 numbers"),
        ({"method": "exact"}, 2 * (200 + 600 + 36), 0, "sketch.method exact"),
        ({"method": "one_sided", "rank": 4}, "products", 4 * 4 * (10 + 20 + 6), "sums of"),
    ],
    ids=["two_sided", "both_sides", "exact", "one_sided"],
)
def test_disk_follows_how_gradients_are_compressed(write, sketch, per_pair, sums, said):
    """Bytes per pair beside ids and scalars; one-sided: a sum per language and part of the first pass."""
    size = {"aggregate_size": 100} if sketch.get("method") == "one_sided" else {}
    config = load_config(write(gradients={"sketch": sketch} | size, conflict={"leave_out": "pair"}))
    sizes = Sizes.of(config, rows=1000, weights=0, memory=0, layers=LAYERS)
    languages = len(config.languages.seen)
    disk = next(needs(config, sizes))
    if per_pair == "products":  # of two blocks with every language, and the squared norms
        per_pair = 8 * 2 * (languages + 1) + doctor_size._ROW_BYTES
    assert disk.values["gb_per_million_pairs"] * 1000 == pytest.approx(per_pair + doctor_size._ROW_BYTES)
    assert disk.values.get("sums_bytes", 0) == sums * languages * -(-sizes.pairs // 100)
    assert said in disk.what and "GB per million pairs" in disk.what


def test_a_reference_that_is_another_model_is_in_memory_beside_the_policy(write):
    def gradients(**changes: object) -> float:
        config = load_config(write(**changes))
        found = needs(config, Sizes.of(config, rows=10, weights=8 * 2**30, memory=2**30))
        (said,) = (f.what for f in found if f.what.startswith("gradients needs"))
        return float(re.findall(r"about ([0-9.]+) GiB", said)[0])

    assert gradients(model__reference="other") - gradients() == pytest.approx(8)
    assert gradients(rounds=2, train__reference="initial") - gradients(rounds=2) == pytest.approx(8)


@pytest.mark.parametrize(
    ("train", "gpus", "times"),
    [
        ({}, 8, 8),
        ({"processes": 8}, 8, 1),
        ({"processes": 0}, 4, 2),
        ({"processes": 8, "nodes": 2, "sharding": "fsdp2"}, 8, 0.5),
        ({"processes": 8, "nodes": 2}, 8, 1),
        ({"processes": 8, "sharding": "ddp"}, 8, 8),
        ({"processes": 2}, 0, 8),
        ({"processes": 2, "sharding": "ddp"}, 0, 16),
    ],
    ids=["one", "fsdp2", "all", "fsdp2 of machines", "hsdp", "ddp", "fsdp2 on a CPU", "ddp on a CPU"],
)
def test_training_in_several_processes_needs_their_share_of_each_device(write, train, gpus, times):
    """`times` the weights in bfloat16 (16 bytes a parameter), and 1 GiB; a problem only where what must be there is too much."""
    config = load_config(write(train={"method": "full", "batch_size": 16, "micro_batch_size": 1, **train}))
    gib = 2.0**30
    sizes = Sizes.of(config, rows=10, weights=16 * gib, memory=gib / 10, gpus=gpus)
    said = {f.what.split()[0]: f for f in needs(config, sizes) if f.check == "memory"}
    assert said["train"].what.startswith(f"train needs about {times * 16 + 1:.1f} GiB")
    roomy = Sizes.of(config, rows=10, weights=16 * gib, memory=12 * gib, gpus=gpus)
    states = {f.what.split()[0]: f.state for f in needs(config, roomy) if f.check == "memory"}
    assert states["gradients"] == "problem"
    assert states.get("train", "ok") == ("ok" if times < 0.6 else "warning" if times < 8 and gpus else "problem")
