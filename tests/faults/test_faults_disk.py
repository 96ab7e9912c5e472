"""Full disks, read-only folders, file systems that cannot rename: one clear paragraph, nothing half-written."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.storage import ensure_usable, mount_type, storage_error
from schemas.errors import UserError
from tests.faults.crashing import DISK_ERRORS, failing


@pytest.mark.parametrize("number", DISK_ERRORS)
@pytest.mark.parametrize("operation", ["fsync", "replace", "open"])
def test_a_failing_disk_is_said_in_words_and_the_same_command_continues(fake, number, operation):
    fake(last="prompts")
    with failing(operation, number, after=12), pytest.raises(UserError) as caught:
        fake()
    assert "continues" in str(caught.value) or "--run-dir" in str(caught.value)
    fake()
    broken = fake.tables()
    fake(f"run_dir={fake.folder / 'undisturbed'}")
    fake.root = fake.folder / "undisturbed" / "t"
    assert {n: d for n, d in broken.items() if n.endswith("parquet")} == {
        n: d for n, d in fake.tables().items() if n.endswith("parquet")
    }


def test_a_full_disk_names_itself_wherever_the_error_comes_from(tmp_path):
    for error in (
        OSError(errno.ENOSPC, "No space left on device", "/x/y"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        found = storage_error(error, tmp_path)
        assert found is not None and "disk is full" in str(found) and "continues" in str(found)
    try:
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        except OSError as inner:
            raise ValueError("could not save") from inner
    except ValueError as outer:
        assert "quota" in str(storage_error(outer, tmp_path))
    assert storage_error(ValueError("a defect"), tmp_path) is None
    assert storage_error(FileNotFoundError(errno.ENOENT, "No such file", "x"), tmp_path) is None


def test_a_worker_that_reaches_a_file_size_limit_says_so(fake_process):
    """RLIMIT_FSIZE makes real writes fail in a real worker, as a full disk does."""
    many = ("--set", "prompts.max_chars=16000", "--set", "generate.shard_size=8000", "--until")
    process, run = fake_process(*many, "prompts")
    process.communicate(timeout=120)
    command = [*process.args[:-1], "generate"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "250"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert not list((run.root / "round-0").rglob("*.parquet")) and not list((run.root / "_tmp").iterdir())
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and "size limit" in done.stderr and "ulimit -f" in done.stderr
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="this machine lets no user mount a small file system of its own",
)
def test_a_disk_that_is_really_full_and_then_is_not(tmp_path, fake_process):
    command, folder = " ".join(fake_process.command), fake_process.run.root.parent
    small = f"mkdir -p {folder} && mount -t tmpfs -o size=40k x {folder} && {{ {command}; echo ended with $?; }}"
    room = f"mount -o remount,size=16m {folder} && {command}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", f"{small}; {room}"], capture_output=True, text=True)
    assert "ended with 1" in done.stdout and "The disk is full" in done.stderr and "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr  # the same command, with room


def test_a_read_only_folder_is_refused_before_any_work(fake):
    with failing("mkdir", errno.EROFS), pytest.raises(UserError, match=r"cannot be written.*--run-dir"):
        fake()
    assert not fake.computed


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(fake):
    fake.root.mkdir(parents=True)
    fake.root.chmod(0o555)
    with pytest.raises(UserError, match=r"cannot be written.*--run-dir"):
        fake()
    fake.root.chmod(0o755)


def test_a_file_system_without_rename_is_refused(tmp_path):
    with failing("replace", errno.ENOTSUP), pytest.raises(UserError, match=r"does not rename.*--run-dir"):
        ensure_usable(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_advice_is_for_the_command_that_wants_the_folder(tmp_path):
    with (
        failing("replace", errno.ENOTSUP),
        pytest.raises(UserError, match=r"Name another place for the new run") as error,
    ):
        ensure_usable(tmp_path, "fork")
    assert "--run-dir" not in str(error.value)
    with failing("replace", errno.ENOTSUP), pytest.raises(UserError, match=r"Name another folder with --out"):
        ensure_usable(tmp_path, "compare")
    full = OSError(errno.ENOSPC, "No space left on device", "x")
    assert "name another place for the new run" in str(storage_error(full, None, "fork"))


def test_a_rename_that_only_copies_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "replace", lambda a, b: Path(b).write_bytes(Path(a).read_bytes()) if Path(a).is_file() else 0
    )
    with pytest.raises(UserError, match="does not replace"):
        ensure_usable(tmp_path)


def test_an_object_store_mount_is_refused_by_its_type(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    bucket = tmp_path / "my bucket"
    bucket.mkdir()
    shown = str(bucket).replace(" ", "\\040")
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nbucket {shown} fuse.s3fs rw 0 0\nbroken\n")
    assert mount_type(bucket / "runs" / "t", mounts) == "fuse.s3fs"
    assert mount_type(tmp_path, mounts) == "ext4"
    assert mount_type(tmp_path, tmp_path / "none") == ""
    monkeypatch.setattr(storage, "mount_type", lambda folder, table: "fuse.s3fs")
    with pytest.raises(UserError, match=r"object store \(fuse\.s3fs\).*--run-dir"):
        ensure_usable(bucket)
    monkeypatch.setattr(storage, "mount_type", lambda folder, table: "nfs4")
    ensure_usable(bucket)
    assert not list(bucket.iterdir())
