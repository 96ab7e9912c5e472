"""What a run needs of its file system, checked before work starts, and disk errors said in words."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from schemas import files
from schemas.errors import UserError

_OBJECT_MOUNTS = (
    "s3fs",
    "mountpoint-s3",
    "goofys",
    "geesefs",
    "gcsfuse",
    "blobfuse",
    "blobfuse2",
    "rclone",
    "ossfs",
    "cosfs",
)
_CONTINUES = "What is committed stays; the same command continues."
_ADVICE = {
    errno.ENOSPC: ("The disk is full", "Free some space"),
    errno.EDQUOT: ("The disk quota is used up", "Free some space, or have the quota raised"),
    errno.EFBIG: ("A file reached the size limit of this shell or file system", "Raise `ulimit -f`"),
    errno.EROFS: ("The file system is read-only", "Have it mounted writable"),
    errno.EACCES: ("A file or folder may not be accessed", "Change its owner or permissions"),
    errno.EPERM: ("A file or folder may not be changed", "Change its owner or permissions"),
    errno.EIO: ("The disk reports an error", "Check the disk and the system's log"),
    errno.ESTALE: ("The network file system lost a file that was open", "Check the mount"),
    errno.EMFILE: ("Too many files are open", "Raise `ulimit -n`"),
}
_RESUMING = ("run", "compare")
_ELSEWHERE = {
    "run": "use another --run-dir",
    "doctor": "use another --run-dir",
    "export": "name another folder with --out",
    "compare": "name another folder with --out",
    "fork": "name another place for the new run",
}
"""Of the commands that can be told where to write."""
_TEMPORARY = re.compile(r"(?<![^/])\.([^/]+)\.[0-9a-f]{32}\.tmp(?![^/])")
"""As `files.temporary_beside` makes of a name."""
_TEXTS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "File too large": errno.EFBIG,
    "Read-only file system": errno.EROFS,
}


def ensure_usable(folder: Path, command: str = "run") -> None:
    """Create the run directory and check that files can be written, replaced, appended to and renamed in it.

    command: the one that wants it, which the advice is for.

    Raises UserError naming the folder: it cannot be written, or it is an object store mounted as a folder, where a
    rename is a copy that a crash leaves half done.
    """
    another = f"{_elsewhere(command)}, on a local disk or NFS."
    try:
        files.make_folder(folder)
    except OSError as error:
        raise _unwritable(folder, error, command) from error
    kind = mount_type(folder, Path("/proc/self/mounts"))
    if kind.removeprefix("fuse.") in _OBJECT_MOUNTS:
        raise UserError(
            f"The run directory lies on an object store ({kind}), which has no atomic rename",
            where=str(folder),
            fix=another,
        )
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        problem = _problem(probe)
    except OSError as error:
        raise _unwritable(folder, error, command) from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    if problem:
        raise UserError(f"The run directory's file system cannot be used: {problem}", where=str(folder), fix=another)


def mount_type(folder: Path, mounts: Path) -> str:
    """Type of the file system that holds `folder`, as the mount table says; empty if it cannot be told."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    path, best, kind = folder.resolve(), -1, ""
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(fields[1].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\"))
        if len(point.parts) >= best and path.is_relative_to(point):
            best, kind = len(point.parts), fields[2]
    return kind


def storage_error(error: BaseException, root: Path | None, command: str = "run") -> UserError | None:
    """The user's error behind an exception, if a disk is what failed: libraries wrap and reword it.

    root: the run directory, where a run is going on; command: the one that failed, which the advice is for.
    """
    for cause in sorted(_chain(error), key=lambda found: not isinstance(found, OSError)):  # it names the file
        if isinstance(cause, FileNotFoundError | NotADirectoryError) and root and not root.is_dir():
            fix = "It was moved, deleted or unmounted while the run was going on. Put it back; the same command continues."
            return UserError("The run directory is gone", where=str(root), fix=fix)
        number = cause.errno if isinstance(cause, OSError) else None
        if number not in _ADVICE:
            number = next((n for text, n in _TEXTS.items() if text in str(cause)), None)
        if number is not None:
            name = cause.filename if isinstance(cause, OSError) else None
            where = shown_path(name) if name else str(root or "")
            return UserError(_ADVICE[number][0], where=where, fix=_fix(number, command))
    return None


def shown_path(name: str | bytes | None) -> str:
    """A file as people know it: not the temporary name that it has until it is whole."""
    return _TEMPORARY.sub(r"\1", os.fsdecode(name)) if name else ""


def _fix(number: int, command: str) -> str:
    resumes, elsewhere = command in _RESUMING, _ELSEWHERE.get(command)
    full = number in (errno.ENOSPC, errno.EDQUOT) and not resumes  # what resumes does so where it was
    other = f", or {elsewhere}" if elsewhere and (full or number == errno.EROFS) else ""
    return f"{_ADVICE[number][1]}{other}." + (f" {_CONTINUES}" if resumes else "")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _problem(probe: Path) -> str:
    """What is wrong with the file system, in words; empty if nothing. Raises OSError where nothing can be written."""
    probe.mkdir()
    old, new, log = probe / "old", probe / "new", probe / "log"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    files.fsync(new)
    try:
        os.replace(new, old)
        files.fsync(probe)
        (probe / "a").mkdir()
        os.replace(probe / "a", probe / "b")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        return f"it does not rename files and folders ({error.strerror})"
    if new.exists() or old.read_bytes() != b"new" or not (probe / "b").is_dir():
        return "a renamed file does not replace the old one"
    try:
        for _ in range(2):
            with log.open("ab") as handle:
                handle.write(b"x")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        return f"it does not append to files ({error.strerror})"
    return "" if log.read_bytes() == b"xx" else "what is appended to a file replaces it"


def _elsewhere(command: str) -> str:
    return _ELSEWHERE[command].capitalize()


def _unwritable(folder: Path, error: OSError, command: str) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return storage_error(error, folder, command) or UserError("The disk is full", where=str(folder))
    return UserError(
        f"The run directory cannot be written: {error.strerror}",
        where=str(folder),
        fix=f"{_elsewhere(command)}, or have this one made writable.",
    )
