"""Where everything of a run lies: see the tree in docs/tables.md. State is files a person can list."""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.manifest_files import Reader, load, uncollected
from pipeline.parts import Parts
from schemas import files
from schemas.errors import UserError
from schemas.manifests import FileRecord, PartFiles, PartManifest, StageManifest, StagePlan
from stages.catalog import STAGES
from stages.spec import StageSpec

KEPT = "_kept"
_UNFINISHED = "unfinished-"


def run_around(path: Path) -> Path | None:
    """The run that a path lies in, however deep, behind links too; None where it lies in none."""
    return next((folder for folder in _real(path).parents if _is_run(folder)), None)


def run_that_owns(path: Path) -> Path | None:
    """The run that a path lies in where that run writes and deletes; None where it lies in none, or elsewhere in one."""
    if (run := run_around(path)) is None:
        return None
    name = _real(path).relative_to(run).parts[0]
    owned = {name for spec in STAGES for name in (spec.name, *spec.writes)} | {"logs", KEPT}
    return run if name.startswith(("_", "round-")) or name in owned else None


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run: a config may be called run.yaml too."""
    return (folder / "run.yaml").exists() and (folder / "events.jsonl").exists()


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path.parent), path.name)


class RunDir:
    """Paths and state of one run directory. Reads and writes no tables.

    The run directory itself may lie behind a link; nothing in it may be one, for what is written to or deleted from a folder would
    be another's. `refuse_place` looks at all of it, and every path that is handed out is looked at again.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._reader = Reader()
        self.foreseen: dict[tuple[str, int], StageManifest] = {}
        """By stage and round, what lies aside and is going to be brought back: see `Planner.states`."""

    @property
    def config(self) -> Path:
        return self.root / "run.yaml"

    @property
    def events(self) -> Path:
        return self._own(self.root / "events.jsonl")

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def logs(self) -> Path:
        return self._own(self.root / "logs")

    @property
    def temporary(self) -> Path:
        """Holds unfinished files; emptied by the driver when it takes the lease."""
        return self._own(self.root / "_tmp")

    def refuse_place(self) -> None:
        """Before anything is written or deleted: raise UserError where the run lies in another's tables, and for a link anywhere in its directory."""
        if (other := run_that_owns(self.root)) is not None:
            raise UserError(
                f"The run would lie in the tables of another, which that one deletes: {self.root}",
                where="run_dir",
                fix=f"Name a place outside of {other}.",
            )
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

    def unfinished(self, spec: StageSpec, round_: int, fingerprint: str, index: int) -> Path:
        """Where a worker leaves what it has of a shard. The fingerprint is in the name: a worker of another plan, that was given up and
        wakes, writes beside it."""
        return self.state(spec, round_) / f"{_UNFINISHED}{index:05d}-{fingerprint[:16]}"

    def all_unfinished(self, spec: StageSpec, round_: int) -> Iterator[Path]:
        """What workers left of shards that were not committed."""
        return self.state(spec, round_).glob(f"{_UNFINISHED}*")

    def artifacts(self, spec: StageSpec, round_: int) -> Path:
        """An ArtifactStage's own folder."""
        return self._own(self.base(spec, round_) / spec.name)

    def kept(self, spec: StageSpec, round_: int) -> Path:
        """Folder of the stage's results with other settings, see `pipeline.aside`."""
        return self.base(spec, round_) / KEPT / spec.name

    def kept_with(self, spec: StageSpec, round_: int, fingerprint: str) -> KeptDir | None:
        """The results that were kept aside with these settings, if there are any."""
        entry = self.kept(spec, round_) / fingerprint
        there = KeptDir(self.root, entry)
        return there if there.state(spec, round_).is_dir() else None

    def plan(self, spec: StageSpec, round_: int) -> StagePlan | None:
        return self._reader.load(self.state(spec, round_) / "plan.json", StagePlan)

    def stage(self, spec: StageSpec, round_: int) -> StageManifest | None:
        """The manifest of a finished stage."""
        return self._reader.load(self.state(spec, round_) / "_stage.json", StageManifest, torn_is_none=True)

    def result(self, spec: StageSpec, round_: int) -> StageManifest | None:
        """The stage's manifest as a run will find it: what is brought back first is already counted."""
        return self.foreseen.get((spec.name, round_)) or self.stage(spec, round_)

    def part_json(self, spec: StageSpec, round_: int, index: int) -> Path:
        """The commit of a part: it exists if and only if this file does."""
        return self.state(spec, round_) / _json_name(index)

    def part(self, spec: StageSpec, round_: int, index: int) -> PartManifest:
        """A committed part. Raises UserError if it cannot be read."""
        return _part(self.part_json(spec, round_, index))

    def committed(self, spec: StageSpec, round_: int, fingerprint: str) -> dict[int, float]:
        """Seconds of work of every committed part whose files are there in full size, by its index. Others are as if never made."""
        found, folder = {}, self.state(spec, round_)
        with uncollected():
            for name in _part_jsons(folder):
                part = load(f"{folder}/{name}", PartFiles, torn_is_none=True)
                if part is None or part.fingerprint != fingerprint or name != _json_name(part.index):
                    continue
                if self.are_there(spec, round_, part.files):
                    found[part.index] = part.seconds
        return found

    def parts(self, spec: StageSpec, round_: int, committed: Iterable[int]) -> Parts:
        """What these parts add up to. Raises UserError for one that cannot be read."""
        folder = self.state(spec, round_)
        with uncollected():
            return Parts(_part(f"{folder}/{_json_name(index)}") for index in committed)

    def forget_parts(self, spec: StageSpec, round_: int, but: Container[int]) -> None:
        """Take back what is committed, except these parts."""
        folder = self.state(spec, round_)
        files.remove(folder / name for name in _part_jsons(folder) if _index_of(name) not in but)

    def are_there(self, spec: StageSpec, round_: int, records: Iterable[FileRecord]) -> bool:
        """Whether recorded files of a stage are there in full size."""
        return files.have_sizes(self.root, records)

    def has_made(self, spec: StageSpec, round_: int) -> bool:
        """Whether the stage ever began here, with any settings."""
        return self.plan(spec, round_) is not None or self.kept(spec, round_).is_dir()

    def has_work(self, spec: StageSpec, round_: int) -> bool:
        """Whether there is work that would be lost if the stage's place were cleared."""
        folder = self.artifacts(spec, round_)
        return (
            any(self.state(spec, round_).glob("part-*.json"))
            or any(self.all_unfinished(spec, round_))
            or (bool(spec.keeps) and any(folder.glob(spec.keeps)))
        )

    def verify(self, records: list[FileRecord]) -> list[FileRecord]:
        """Recorded files whose content is no longer what was recorded."""
        return [f for f in records if not files.is_intact(self.root, f, thorough=True)]

    def clear(self, spec: StageSpec, round_: int) -> None:
        """Forget a stage's results: state first, so that nothing half-deleted counts as committed."""
        state = self.state(spec, round_)
        files.remove([state / "_stage.json", *state.glob("part-*.json")])
        files.remove([state / "plan.json", *self.all_unfinished(spec, round_)])
        for table in (*spec.writes, "dropped"):
            shutil.rmtree(self.table(spec, round_, table), ignore_errors=True)
        if spec.kind == "artifact":
            shutil.rmtree(self.artifacts(spec, round_), ignore_errors=True)

    def was_forced(self, spec: StageSpec, round_: int) -> bool:
        """Whether an unfinished run with --force-stage has already begun this stage anew: the same command continues."""
        return (self.root / f"_forced-{spec.name}-{round_}").exists()

    def mark_forced(self, spec: StageSpec, round_: int) -> None:
        files.write_text(self.root / f"_forced-{spec.name}-{round_}", "")

    def forget_forced(self, spec: StageSpec | None = None, round_: int = 0) -> None:
        """Of one stage, or of all."""
        files.remove(self.root.glob(f"_forced-{spec.name}-{round_}" if spec else "_forced-*"))

    def leftovers(self) -> list[Path]:
        """Unfinished files of killed runs: temporary tables, manifests, artifacts and probes."""
        names = [*self.root.glob(".*.tmp"), *self.root.glob(".probe-*"), *self.root.glob("**/_state/*/.*.tmp")]
        for spec in STAGES:
            if spec.kind == "artifact":
                for base in (self.root, *self.root.glob("round-*")):
                    names += (base / spec.name).rglob(".*.tmp")
        names += [*self.root.glob(f"{KEPT}/*/.*.tmp"), *self.root.glob(f"round-*/{KEPT}/*/.*.tmp")]
        return [*(self.temporary.iterdir() if self.temporary.is_dir() else []), *names]

    def sweep(self, spec: StageSpec, round_: int, records: Iterable[FileRecord]) -> None:
        """Remove parts that no manifest of the finished stage knows: left by a killed run, or by an earlier plan."""
        known = {self.root / record.path for record in records}
        for table in (*spec.writes, "dropped"):
            files.remove(path for path in self.table(spec, round_, table).glob("part-*.parquet") if path not in known)
        files.remove(list(self.all_unfinished(spec, round_)))

    def _own(self, path: Path) -> Path:
        """A path in the run directory. Raises UserError where a folder on the way, or what it names, is a link."""
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


class KeptDir(RunDir):
    """One entry of results that are kept aside: the same paths below another folder. Records still name the stage's own place."""

    def __init__(self, root: Path, entry: Path) -> None:
        super().__init__(root)
        self.entry = entry

    def base(self, spec: StageSpec, round_: int) -> Path:
        return self.entry

    def are_there(self, spec: StageSpec, round_: int, records: Iterable[FileRecord]) -> bool:
        own = super().base(spec, round_).relative_to(self.root)
        moved = (replace(f, path=Path(f.path).relative_to(own).as_posix()) for f in records)
        return files.have_sizes(self.entry, moved)


def _part(path: str | Path) -> PartManifest:
    part = load(path, PartManifest)
    if part is None:
        raise UserError("This manifest is gone", where=str(path), fix="Repeat the same command.")
    return part


def _json_name(index: int) -> str:
    return f"part-{index:05d}.json"


def _index_of(name: str) -> int:
    """The part that a file is the commit of, by its name; -1: of none."""
    digits = name[len("part-") : -len(".json")]
    return int(digits) if digits.isdecimal() and name == _json_name(int(digits)) else -1


def _part_jsons(folder: Path) -> list[str]:
    """Names, in the order of the parts."""
    names = [n for n in os.listdir(folder) if n.startswith("part-") and n.endswith(".json")] if folder.is_dir() else []
    return sorted(names, key=lambda name: (len(name), name))
