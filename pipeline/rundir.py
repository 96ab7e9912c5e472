"""Where everything of a run lies: see the tree in docs/tables.md. State is files a person can list."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from schemas import files
from schemas.errors import UserError
from schemas.manifests import MANIFEST_VERSION, FileRecord, PartManifest, StageManifest, StagePlan
from stages.catalog import STAGES
from stages.spec import StageSpec

_Manifest = TypeVar("_Manifest", bound=BaseModel)
_DELETE = "Delete the file: what it describes is then made again."
_OTHER_VERSION = "It was written by another version of the pipeline: use that version, or another --run-dir."


class RunDir:
    """Paths and state of one run directory. Reads and writes no tables.

    The run directory itself may lie behind a link; nothing in it may be one, for what is written to or deleted from a folder would
    be another's. `refuse_links` looks at all of it, and every path that is handed out is looked at again.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def config(self) -> Path:
        return self.root / "run.yaml"

    @property
    def events(self) -> Path:
        return self._own("events.jsonl")

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def logs(self) -> Path:
        return self._own("logs")

    @property
    def temporary(self) -> Path:
        """Holds unfinished files; emptied by the driver when it takes the lease."""
        return self._own("_tmp")

    def refuse_links(self) -> None:
        """Raise UserError for a link anywhere in the run directory, before anything is written or deleted."""
        for folder, folders, names in os.walk(self.root):
            for name in (*folders, *names):
                _refuse_link(Path(folder, name))

    def base(self, spec: StageSpec, round_: int) -> Path:
        """Folder that holds a stage's tables and state."""
        return self.root / f"round-{round_}" if spec.per_round else self.root

    def table(self, spec: StageSpec, round_: int, table: str) -> Path:
        """Folder of one table; dropped rows lie in _dropped/<first table>."""
        base = self.base(spec, round_)
        if table == "dropped":
            return self._own(base / "_dropped" / (spec.writes[0] if spec.writes else spec.name))
        return self._own(base / table)

    def state(self, spec: StageSpec, round_: int) -> Path:
        return self._own(self.base(spec, round_) / "_state" / spec.name)

    def artifacts(self, spec: StageSpec, round_: int) -> Path:
        """An ArtifactStage's own folder."""
        return self._own(self.base(spec, round_) / spec.name)

    def plan(self, spec: StageSpec, round_: int) -> StagePlan | None:
        return _load(self.state(spec, round_) / "plan.json", StagePlan)

    def stage(self, spec: StageSpec, round_: int) -> StageManifest | None:
        return _load(self.state(spec, round_) / "_stage.json", StageManifest, torn_is_none=True)

    def parts(self, spec: StageSpec, round_: int, fingerprint: str) -> dict[int, PartManifest]:
        """Committed parts whose files are there in full size, by index. Others are as if never made."""
        found = {}
        for path in sorted(self.state(spec, round_).glob("part-*.json")):
            part = _load(path, PartManifest, torn_is_none=True)
            if part is None or part.fingerprint != fingerprint:
                continue
            if all(files.is_intact(self.root, f, thorough=False) for f in part.files):
                found[part.index] = part
        return found

    def verify(self, records: list[FileRecord]) -> list[FileRecord]:
        """Recorded files whose content is no longer what was recorded."""
        return [f for f in records if not files.is_intact(self.root, f, thorough=True)]

    def clear(self, spec: StageSpec, round_: int) -> None:
        """Forget a stage's results: state first, so that nothing half-deleted counts as committed."""
        state = self.state(spec, round_)
        files.remove([state / "_stage.json", *state.glob("part-*.json")])
        files.remove([state / "plan.json"])
        for table in (*spec.writes, "dropped"):
            shutil.rmtree(self.table(spec, round_, table), ignore_errors=True)
        if spec.kind == "artifact":
            shutil.rmtree(self.artifacts(spec, round_), ignore_errors=True)

    def was_forced(self, spec: StageSpec, round_: int) -> bool:
        """Whether an unfinished run with --force-stage has already begun this stage anew: the same command continues."""
        return (self.root / f"_forced-{spec.name}-{round_}").exists()

    def mark_forced(self, spec: StageSpec, round_: int) -> None:
        files.write_text(self.root / f"_forced-{spec.name}-{round_}", "")

    def forget_forced(self) -> None:
        files.remove(self.root.glob("_forced-*"))

    def leftovers(self) -> list[Path]:
        """Unfinished files of killed runs: temporary tables, manifests, artifacts and probes."""
        names = [*self.root.glob(".*.tmp"), *self.root.glob(".probe-*"), *self.root.glob("**/_state/*/.*.tmp")]
        for spec in STAGES:
            if spec.kind == "artifact":
                for base in (self.root, *self.root.glob("round-*")):
                    names += (base / spec.name).rglob(".*.tmp")
        return [*(self.temporary.iterdir() if self.temporary.is_dir() else []), *names]

    def sweep(self, spec: StageSpec, round_: int, records: Iterable[FileRecord]) -> None:
        """Remove parts that no manifest of the finished stage knows: left by a killed run, or by an earlier plan."""
        known = {self.root / record.path for record in records}
        for table in (*spec.writes, "dropped"):
            files.remove(path for path in self.table(spec, round_, table).glob("part-*.parquet") if path not in known)

    def _own(self, path: Path | str) -> Path:
        """The path in the run directory. Raises UserError where a folder on the way, or what it names, is a link."""
        path = self.root / path
        for part in (path, *path.parents[: len(path.parts) - len(self.root.parts) - 1]):
            _refuse_link(part)
        return path


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(
            "There is a link in the run directory, and what lies behind it is not the run's to write or delete",
            where=f"{path} -> {os.readlink(path)}",
            fix="Put a folder in its place. To have runs on another disk, set run_dir (--run-dir), or link the whole run directory.",
        )


def _load(path: Path, model: type[_Manifest], *, torn_is_none: bool = False) -> _Manifest | None:
    """The manifest; None if there is none, or if it is torn (no JSON) and what it describes is simply made again.

    Raises UserError on a manifest of another version or with other fields.
    """
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise UserError(
            "This manifest may not be read", where=str(path), fix="Change its owner or permissions."
        ) from None
    try:
        return _of_this_version(path, model.model_validate_json(raw))
    except ValidationError as error:
        try:
            value = json.loads(raw)
        except ValueError:
            if torn_is_none:
                return None
            value = {}
        version = value.get("version", MANIFEST_VERSION) if isinstance(value, dict) else MANIFEST_VERSION
        fix = _OTHER_VERSION if version != MANIFEST_VERSION else _DELETE
        raise UserError("This manifest cannot be read", where=str(path), fix=fix) from error


def _of_this_version(path: Path, manifest: _Manifest) -> _Manifest:
    if getattr(manifest, "version", MANIFEST_VERSION) != MANIFEST_VERSION:
        raise UserError("This manifest cannot be read", where=str(path), fix=_OTHER_VERSION)
    return manifest
