"""Files of a run that are no longer what was written: found by their hashes, said in one way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.rundir import RunDir
from pipeline.status import states_of
from schemas import files
from schemas.errors import UserError
from schemas.manifests import FileRecord


def no_longer(what: str, path: Path | str) -> UserError:
    """The error of a file that is not there any more as it was written."""
    return UserError(
        f"This {what} is no longer what was written",
        where=str(path),
        fix="Delete it and run again: the stage that made it makes it anew, or continues from its last checkpoint.",
    )


def refuse_damaged(folder: Path, table: str, records: Sequence[FileRecord]) -> None:
    """Read the files of a table of the run. Raises UserError for the first that is no longer what was written."""
    bad = next((record for record in records if not files.is_intact(folder, record, thorough=True)), None)
    if bad is not None:
        raise no_longer(f"part of {table}", folder / bad.path)


def damage(folder: Path) -> UserError | None:
    """The first file of finished results that is no longer what was written. Reads all of them."""
    rundir = RunDir(folder)
    for state in states_of(folder):
        records = state.manifest.files if state.manifest is not None and state.kind == "done" else []
        for bad in rundir.verify(records):
            return no_longer(f"part of {bad.table}" if bad.table else f"file of {state.step.title}", folder / bad.path)
    return None


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Around what reads a run's tables: where it fails over a damaged file, that file is the error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (problem := damage(folder)) is None:
            raise
        raise problem from error
