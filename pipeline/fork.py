"""`fork`: a new run that begins with what another has finished, up to the first stage that the new settings change.

Tables are shared as hard links: one file under two names, taken into the new run only if its content is what was recorded. Nothing here
ever writes into a table's file again (every part is written under a temporary name and renamed), and deleting, redoing or setting aside only
takes a name away: so neither run can damage the other. What a stage keeps in a folder of its own (models) is copied, since libraries do write
into such files; so is everything where the file system has no hard links. The new run appears at once, whole.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config_file import dump, load_config
from pipeline.events import Events
from pipeline.models import Models
from pipeline.plan import Planner, State
from pipeline.rundir import RunDir, run_around
from pipeline.status import recorded_planner
from pipeline.storage import ensure_usable
from schemas import files
from schemas.config import RunConfig
from schemas.config.run import NAME
from schemas.errors import UserError
from schemas.manifests import FileRecord

_NAME = re.compile(NAME)
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass
class Forked:
    """The new run. shared: its steps that are finished already; left: those that are not, and why; without: what of the old run's settings has
    no use in it, in sentences; linked, copied: bytes."""

    config: RunConfig
    shared: list[State]
    left: list[State]
    without: list[str]
    linked: int = 0
    copied: int = 0


def fork(old: Path, new: Path, settings: Sequence[str], command: str = "fork") -> Forked:
    """Make the run `new` (a path, or a name beside the old run) of the run `old` with `a.b=value` settings changed.

    command: the one that wants it, which advice on disks is for.

    Raises UserError where there is something already, where a setting is wrong, and where a finished file is not what was recorded.
    """
    old = old.resolve()
    target = old.parent / new if len(new.parts) == 1 else new
    if placing := next((s for s in settings if s.partition("=")[0] in ("name", "run_dir")), None):
        raise UserError(f"Where the new run lies is said by NEW, not by {placing}", where="--set", fix="Leave it out.")
    if not _NAME.fullmatch(target.name):
        raise UserError(f"{target.name!r} is no name for a run", where=str(new), fix=f"A name is {_NAME.pattern}.")
    if (target.parent / "run.yaml").exists() or run_around(target) is not None:
        raise UserError("The new run would lie inside another", where=str(target), fix="Name a place outside of it.")
    without: list[str] = []
    config = load_config(
        old / "run.yaml", [*settings, f"name={json.dumps(target.name)}"], target.parent, leaves_out=without.append
    )
    if target.exists() or target.is_symlink():
        raise UserError("There is something already", where=str(target), fix="Name another run, or delete it first.")
    rundir = RunDir(old)
    states = _planner(config, old, rundir).states()
    ensure_usable(target.parent, command)
    forked = Forked(config, [s for s in states if s.is_current], [s for s in states if not s.is_current], without)
    with files.publishing(target) as folder:
        folder.mkdir()
        for state in forked.shared:
            _share(rundir, state, folder, forked)
        (folder / "run.yaml").write_text(dump(config), encoding="utf-8")
        Events(folder / "events.jsonl").add(
            "forked", run=str(old), settings=list(settings), stages=[state.step.title for state in forked.shared]
        )
    return forked


def _planner(config: RunConfig, old: Path, rundir: RunDir) -> Planner:
    """What of the old run is current with the new settings. Models are taken as they were recorded, but for those that are named otherwise now:
    these are looked at, and are others where they cannot be."""
    models = Models(config, rundir)

    def looked_at(role: str, round_: int) -> str:
        try:
            return models.digest(role, round_)
        except UserError:
            return "another one"

    return recorded_planner(config, old, looked_at)


def _share(rundir: RunDir, state: State, folder: Path, forked: Forked) -> None:
    """Put a finished step's files and its state into the new run."""
    spec, round_ = state.step.spec, state.step.round
    there = state.aside or rundir
    base, own = there.base(spec, round_), rundir.base(spec, round_)
    assert state.manifest is not None
    for record in state.manifest.files:
        source = base / (rundir.root / record.path).relative_to(own)
        _check(source, record)
        _take(source, folder / record.path, record, forked)
    mine = folder / own.relative_to(rundir.root) / "_state" / spec.name
    mine.mkdir(parents=True)
    for manifest in sorted(there.state(spec, round_).glob("*.json")):
        shutil.copyfile(manifest, mine / manifest.name)


def _check(source: Path, record: FileRecord) -> None:
    try:
        intact = source.stat().st_size == record.bytes and files.sha256(source) == record.sha256
    except FileNotFoundError:
        intact = False
    if not intact:
        raise UserError(
            "This file is no longer what was written",
            where=str(source),
            fix="Delete it and bring the run up to date (congrad run CONFIG), then fork it.",
        )


def _take(source: Path, target: Path, record: FileRecord, forked: Forked) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if record.table is not None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            forked.linked += record.bytes
            return
    shutil.copyfile(source, target)
    forked.copied += record.bytes
