"""What is published is there whole, on disk, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from schemas import files


@pytest.fixture
def operations(monkeypatch):
    """(operation, path) of every flush and rename, in order."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor):
        done.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(old, new):
        done.append(("rename", str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    return done


def test_every_file_of_a_folder_is_on_disk_before_the_folder_has_its_name_and_the_name_after_it(tmp_path, operations):
    work, final = tmp_path / "work", tmp_path / "deep" / "model"
    (work / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (work / name).write_text(name)
    files.publish(work, final)
    at = operations.index(("rename", str(final)))
    before = {path for kind, path in operations[:at] if kind == "fsync"}
    assert before >= {str(work), str(work / "inner"), str(work / "a"), str(work / "inner" / "b"), str(tmp_path)}
    assert ("fsync", str(final.parent)) in operations[at:]
    assert (final / "inner" / "b").read_text() == "inner/b"


def test_a_folder_replaces_the_one_that_has_its_name_and_mixes_nothing(tmp_path):
    final = tmp_path / "model"
    for name in ("old", "new"):
        with files.publishing(final) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [p.name for p in final.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("folder", [False, True])
def test_after_an_error_the_old_is_there_and_nothing_beside_it(tmp_path, folder):
    final = tmp_path / "thing"
    final.mkdir() if folder else final.write_text("old")
    with pytest.raises(ZeroDivisionError), files.publishing(final) as temporary:
        temporary.mkdir() if folder else temporary.write_text("half")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]
    assert folder or final.read_text() == "old"


def test_what_a_kill_leaves_is_known_by_its_name(tmp_path):
    assert files.is_temporary(files.temporary_beside(tmp_path / "report.html"))
    assert not files.is_temporary(Path("report.html"))


def test_files_have_the_permissions_that_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "text", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "text").stat().st_mode & 0o777 == 0o640
