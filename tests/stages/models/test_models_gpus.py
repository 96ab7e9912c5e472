"""GPUs by name, without CUDA, and GPUs that torch cannot use."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.checks.machine import bfloat16_cost, device_findings
from stages.models.device import device_of
from stages.models.gpus import visible_gpus
from stages.train.model import precision

WHOLE = "GPU 0: NVIDIA A100 (UUID: GPU-a)\nGPU 1: NVIDIA A100 (UUID: GPU-b)\n"
PART = "  MIG 3g.20gb     Device  {n}: (UUID: MIG-{n})\n"
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """nvidia_smi(lines): one on PATH that lists them."""

    def make(lines: str) -> None:
        (tmp_path / "listed").write_text(lines)
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\ncat '{tmp_path / 'listed'}'\n")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


def config_of(**execution: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "languages": {"seen": ["en"]},
            "model": {"policy": "tiny", "dtype": "float32"},
            "pairs": {"sources": [{"path": "p.parquet"}]},
            "execution": execution,
        }
    )


@pytest.mark.parametrize(
    ("lines", "ids"),
    [
        (WHOLE, ["0", "1"]),
        (WHOLE + PART.format(n=0) + PART.format(n=1), ["GPU-a", "MIG-0", "MIG-1"]),
        ("No devices found.\n", []),
    ],
    ids=["whole", "cut by MIG", "none"],
)
def test_the_ids_are_those_that_cuda_takes(lines: str, ids: list[str], nvidia_smi) -> None:
    nvidia_smi(lines)
    assert visible_gpus() == ids


def test_what_the_environment_chooses_is_what_is_visible(nvidia_smi, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(WHOLE)
    for chosen, ids in (("1", ["1"]), ("", []), ("-1", []), ("GPU-a, MIG-1", ["GPU-a", "MIG-1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert visible_gpus() == ids


@no_cuda
def test_a_gpu_that_torch_cannot_use_is_no_reason_to_take_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match=r"can use no GPU here: it is built for .* execution\.device: cpu"):
        device_of(config_of())
    assert device_of(config_of(device="cpu")).type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_of(config_of()).type == "cpu"


@no_cuda
def test_doctor_calls_it_a_problem(nvidia_smi) -> None:
    nvidia_smi(WHOLE)
    (found,) = device_findings(config_of())
    assert found.state == "problem" and "can use no GPU here" in found.what and "device: cpu" in found.fix
    found, *_ = device_findings(config_of(device="cpu"))
    assert found.state == "ok"


@pytest.mark.parametrize(
    ("dtype", "cost", "said"), [("auto", 4.4, True), ("auto", 0.3, False), ("float32", 4.4, False)]
)
def test_doctor_says_that_a_cpu_is_slow_in_bfloat16(
    dtype: str, cost: float, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.checks.machine.bfloat16_cost", lambda: cost)
    config = config_of(device="cpu")
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    _, *more = device_findings(config)
    assert [(each.state, "4.4 times" in each.what, "float32" in each.fix) for each in more] == [
        ("warning", True, True)
    ] * said


def test_products_are_timed_on_any_cpu() -> None:
    assert 0 < bfloat16_cost() < 1000


@pytest.mark.parametrize(
    ("capability", "dtype", "state", "fix"),
    [
        ((7, 0), "float32", "problem", "need capability 7.5"),
        ((7, 0), "auto", "problem", "need capability 7.5"),
        ((7, 5), "auto", "problem", "set model.dtype: float32"),
        ((7, 5), "float32", "ok", ""),
        ((8, 0), "auto", "ok", ""),
    ],
)
def test_doctor_advises_nothing_that_cannot_help(
    capability: tuple[int, int], dtype: str, state: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    card = SimpleNamespace(name="card", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (23 * 2**30, 24 * 2**30))
    (found,) = device_findings(config)
    assert found.state == state and fix in found.fix


def test_training_in_bfloat16_takes_no_gpu_that_only_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says of a T4 that it has bfloat16, unless asked without emulation."""
    config = config_of()
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "auto"})})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match=r"Tesla T4 has no bfloat16 .* float32"):
        precision(config, config.train)
