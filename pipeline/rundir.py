"""Where everything of a run lies: see the tree in docs/tables.md. State is files a person can list."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipeline import files
from schemas.errors import UserError
from schemas.manifests import MANIFEST_VERSION, FileRecord, PartManifest, StageManifest, StagePlan
from stages.catalog import StageSpec

_Manifest = TypeVar("_Manifest", bound=BaseModel)


class RunDir:
    """Paths and state of one run directory. Reads and writes no tables."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def config(self) -> Path:
        return self.root / "run.yaml"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def temporary(self) -> Path:
        """Holds unfinished files; emptied by the driver when it takes the lease."""
        return self.root / "_tmp"

    def base(self, spec: StageSpec, round_: int) -> Path:
        """Folder that holds a stage's tables and state."""
        return self.root / f"round-{round_}" if spec.per_round else self.root

    def table(self, spec: StageSpec, round_: int, table: str) -> Path:
        """Folder of one table; dropped rows lie in _dropped/<first table>."""
        base = self.base(spec, round_)
        if table == "dropped":
            return base / "_dropped" / (spec.writes[0] if spec.writes else spec.name)
        return base / table

    def state(self, spec: StageSpec, round_: int) -> Path:
        return self.base(spec, round_) / "_state" / spec.name

    def artifacts(self, spec: StageSpec, round_: int) -> Path:
        """An ArtifactStage's own folder; the report is written to the root."""
        return self.base(spec, round_) / spec.name if spec.per_round else self.root

    def plan(self, spec: StageSpec, round_: int) -> StagePlan | None:
        return _load(self.state(spec, round_) / "plan.json", StagePlan)

    def stage(self, spec: StageSpec, round_: int) -> StageManifest | None:
        return _load(self.state(spec, round_) / "_stage.json", StageManifest)

    def parts(self, spec: StageSpec, round_: int, fingerprint: str) -> dict[int, PartManifest]:
        """Committed parts whose files are there in full size, by index. Others are as if never made."""
        found = {}
        for path in sorted(self.state(spec, round_).glob("part-*.json")):
            part = _load(path, PartManifest)
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
        files.remove([state / "_stage.json", *state.glob("part-*.json"), state / "plan.json"])
        if state.exists():
            files.fsync(state)
        for table in (*spec.writes, "dropped"):
            shutil.rmtree(self.table(spec, round_, table), ignore_errors=True)
        if spec.kind == "artifact" and spec.per_round:
            shutil.rmtree(self.artifacts(spec, round_), ignore_errors=True)


def _load(path: Path, model: type[_Manifest]) -> _Manifest | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        if f'"version": {MANIFEST_VERSION}' in text or '"version"' not in text:
            fix = "Delete the file: what it describes is then made again."
        else:
            fix = "It was written by another version of the pipeline: use that version, or another --run-dir."
        raise UserError("This manifest cannot be read", where=str(path), fix=fix) from error
