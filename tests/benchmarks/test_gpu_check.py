"""`make gpu-check` runs on a CPU with small sizes, and where packages are missing it says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import trl_loss
from benchmarks.gpu_check.__main__ import run
from benchmarks.gpu_check.report import Sizes

ROOT = Path(__file__).resolve().parents[2]
_HIDDEN = """
import runpy, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("polars", "pyarrow", "trl", "typer", "faiss"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
sys.argv = ["gpu_check", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu_check", run_name="__main__")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """The rows of every part, in a process without the packages that bare machines lack."""
    out = tmp_path_factory.mktemp("check") / "found.json"
    command = [sys.executable, "-c", _HIDDEN, "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "| part | what | value |" in done.stdout
    return json.loads(out.read_text())


def test_every_result_is_right_on_a_cpu(found: dict[str, list[dict[str, str]]]) -> None:
    verdicts = [row["verdict"] for row in found["rows"]]
    assert verdicts.count("right") > 20 and "wrong" not in verdicts
    parts = {row["part"] for row in found["rows"]}
    assert parts >= {"machine", "optimizers", "gradients", "tiny run", "speed"}


def test_parts_without_their_packages_say_that_they_were_not_run(found: dict[str, list[dict[str, str]]]) -> None:
    missing = {row["part"]: row["note"] for row in found["rows"] if row["verdict"] == "not run"}
    lacks = {"stages": "there is no package polars", "TRL's loss": "there is no package trl"}
    assert missing == lacks | {"gradients": "there is no GPU"}


def test_the_loss_that_trl_computes_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels for GPUs are others than those that the tests of training run on a CPU."""
    pytest.importorskip("trl")
    sizes = Sizes.of("cpu", small=True)
    assert [row.verdict for row in run("TRL's loss", sizes)] == ["right"] * 4
    step = trl_loss._step

    def damaged(*arguments: Any, fused: bool) -> tuple[Any, Any]:
        found, gradient = step(*arguments, fused=fused)
        return (found * 1.5, gradient * 1.5) if fused else (found, gradient)

    monkeypatch.setattr(trl_loss, "_step", damaged)
    assert [row.verdict for row in run("TRL's loss", sizes)] == ["wrong"] * 4


def test_speed_rows_have_their_baseline_and_their_aim(found: dict[str, list[dict[str, str]]]) -> None:
    speed = {row["what"]: row for row in found["rows"] if row["part"] == "speed"}
    for name in ("step, anchor paper, reserve 1", "step, onties paper, reserve 0.01", "step, trust region"):
        assert speed[name]["verdict"] == "measured" and speed[name]["bound"].startswith("<=")
    assert "tokens/s" in speed["sketches: share of the matrix ceiling"]["note"]
