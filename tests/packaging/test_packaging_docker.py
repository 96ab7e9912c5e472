"""What the CUDA image adds to NVIDIA's wheels: enough to link what FlashInfer compiles."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

IMAGE = Path(__file__).parents[2] / "docker/Dockerfile.cuda"


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_what_flashinfer_compiles_can_be_linked_against_the_wheels(tmp_path: Path) -> None:
    """Its flags: -L$cuda_home/lib64 -lcudart. The wheels' layout: lib/libcudart.so.13."""
    home = tmp_path / "cu13"
    (home / "lib").mkdir(parents=True)
    empty = tmp_path / "empty.cpp"
    empty.write_text("")
    subprocess.run(["g++", "-shared", "-o", home / "lib/libcudart.so.13", empty], check=True)
    link = ["g++", "-shared", "-o", tmp_path / "made.so", empty, f"-L{home}/lib64", "-lcudart"]
    assert subprocess.run(link, capture_output=True, check=False).returncode
    (line,) = (line for line in IMAGE.read_text(encoding="utf-8").splitlines() if "lib64" in line and "RUN" in line)
    command = line.removeprefix("RUN ")
    subprocess.run(["sh", "-c", command], check=True, env={**os.environ, "CUDA_HOME": str(home)})
    subprocess.run(link, check=True)
