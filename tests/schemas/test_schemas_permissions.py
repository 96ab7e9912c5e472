"""What is published has the permissions that the umask says, whoever wrote it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.files import publish, publishing


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def private(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("as safetensors makes it")
    path.chmod(0o600)
    return path


def modes(*paths: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in paths}


def test_private_files_of_a_published_folder_and_a_published_file_are_opened(tmp_path: Path, umask: int) -> None:
    with publishing(tmp_path / "model") as folder:
        private(folder / "model.safetensors")
        private(folder / "inner" / "other.safetensors")
        (folder / "config.json").write_text("{}")
    found = [p for p in (tmp_path / "model").rglob("*") if p.is_file()]
    assert len(found) == 3 and modes(*found) == {0o666 & ~umask}
    publish(private(tmp_path / "made"), tmp_path / "file")
    assert modes(tmp_path / "file") == {0o666 & ~umask}
    assert {p.name for p in tmp_path.iterdir()} == {"model", "file"}


def test_permissions_that_somebody_chose_are_left(tmp_path: Path) -> None:
    file = private(tmp_path / "made")
    file.chmod(0o640)
    publish(file, tmp_path / "file")
    assert modes(tmp_path / "file") == {0o640}
