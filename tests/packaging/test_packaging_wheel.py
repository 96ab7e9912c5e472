"""A wheel holds the three packages and data/, and its core works where torch and vllm are not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data", "pipeline", "schemas", "stages")

WITHOUT_HEAVY_PACKAGES = """
import sys
for name in ("torch", "transformers", "vllm", "trl", "datasets", "peft"):
    sys.modules[name] = None
import pipeline.cli, pipeline.inspect, pipeline.status, schemas, stages.catalog, stages.select
from stages.data import data_path
assert "unpacked" in schemas.__file__, schemas.__file__
print(data_path("configs/demo.yaml").read_text(encoding="utf-8"))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_source_and_data_file_the_licence_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    information = {name for name in names if ".dist-info/" in name}
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names - information == files
    assert any(name.endswith("/LICENSE") for name in information)


def test_the_core_in_the_wheel_works_without_torch_and_reads_its_data(wheel: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HEAVY_PACKAGES], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (ROOT / "data/configs/demo.yaml").read_text(encoding="utf-8").strip()
