"""What a run consists of, and what of it is done: stages in order, their inputs, their state, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.fingerprint import content_of, differences, fingerprint, ingredients
from pipeline.rundir import RunDir
from schemas import files
from schemas.config import RunConfig
from schemas.manifests import FileRecord, PartManifest, ShardRange, StageManifest, StagePlan
from stages.schedule import Step, schedule
from stages.spec import StageSpec


@dataclass
class Inputs:
    """Tables a step reads; missing ones by the name of the stage that makes them."""

    records: dict[str, list[FileRecord]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def contents(self) -> dict[str, str]:
        return {name: content_of(records) for name, records in self.records.items()}


@dataclass
class State:
    """What is known of a step. parts: of a half-done one, those that are committed."""

    step: Step
    kind: Literal["done", "resume", "new", "changed", "waiting"]
    why: list[str] = field(default_factory=list)
    plan: StagePlan | None = None
    manifest: StageManifest | None = None
    parts: dict[int, PartManifest] = field(default_factory=dict)
    inputs: Inputs = field(default_factory=Inputs)

    @property
    def parts_done(self) -> int:
        return len(self.plan.shards) if self.kind == "done" and self.plan else len(self.parts)


class Planner:
    """Looks at a run directory and says what each step needs. Writes nothing.

    models: (step) -> role -> digest, and files: (spec) -> name -> hash, are given by the caller, since
    finding them may need the models; `status` answers with what was recorded instead.
    frozen: nothing is written meanwhile, so that every manifest is read and its files are looked at only once.
    """

    def __init__(
        self,
        config: RunConfig,
        rundir: RunDir,
        models: Callable[[Step], dict[str, str]],
        config_files: Callable[[StageSpec], dict[str, str]],
        *,
        frozen: bool = False,
    ) -> None:
        self._read: dict[Step, StageManifest | None] | None = {} if frozen else None
        self.config, self.rundir = config, rundir
        self.steps = schedule(config)
        self._models, self._config_files = models, config_files
        self._producer = {(table, s.round): s for s in self.steps for table in s.spec.writes}

    def manifest(self, step: Step) -> StageManifest | None:
        """The step's manifest, if all its files are there in full size."""
        if self._read is None:
            return self._manifest(step)
        if step not in self._read:
            self._read[step] = self._manifest(step)
        return self._read[step]

    def _manifest(self, step: Step) -> StageManifest | None:
        found = self.rundir.stage(step.spec, step.round)
        if found and all(files.is_intact(self.rundir.root, f, thorough=False) for f in found.files):
            return found
        return None

    def inputs(self, step: Step) -> Inputs:
        """The files of every table the step reads."""
        found = Inputs()
        for read in step.spec.reads:
            name = read.rstrip("?")
            table, _, fixed = name.partition(":")
            producer = self._find(table, int(fixed) if fixed else step.round)
            if producer is None:
                if not read.endswith("?"):
                    found.missing.append(table)
                continue
            manifest = self.manifest(producer)
            if manifest is None:
                found.missing.append(producer.title)
            else:
                found.records[name] = manifest.table_files(table)
        return found

    def _find(self, table: str, round_: int) -> Step | None:
        return self._producer.get((table, round_)) or self._producer.get((table, 0))

    def manifests(self) -> list[StageManifest]:
        """Manifests of all finished steps, in order."""
        return [found for step in self.steps if (found := self.manifest(step))]

    def state(self, step: Step) -> State:
        """Whether the step is done, half done, new, or made with other settings."""
        inputs = self.inputs(step)
        if inputs.missing:
            return State(step, "waiting", [f"waits for {', '.join(inputs.missing)}"], inputs=inputs)
        values = self._ingredients(step, inputs)
        print_ = fingerprint(values)
        old = self.rundir.plan(step.spec, step.round)
        if old is not None and old.fingerprint != print_:
            return State(
                step, "changed", differences(old.ingredients, values), self._cut(step, inputs, values), inputs=inputs
            )
        plan = old or self._cut(step, inputs, values)
        manifest = self.manifest(step)
        if manifest and manifest.fingerprint == print_:
            return State(step, "done", plan=plan, manifest=manifest, inputs=inputs)
        parts = self.rundir.parts(step.spec, step.round, print_)
        if old is None:
            return State(step, "new", ["not run yet"], plan, inputs=inputs)
        why = [f"{len(parts)} of {len(plan.shards)} parts are done"]
        return State(step, "resume", why, plan, parts=parts, inputs=inputs)

    def has_work(self, step: Step) -> bool:
        """Whether the step's directory holds work that would be lost if it were redone."""
        state = self.rundir.state(step.spec, step.round)
        folder = self.rundir.artifacts(step.spec, step.round)
        return any(state.glob("part-*.json")) or (step.spec.checkpoints and any(folder.glob("checkpoints/*")))

    def _ingredients(self, step: Step, inputs: Inputs) -> dict[str, Any]:
        return ingredients(
            step.spec,
            self.config,
            step.round,
            inputs=inputs.contents(),
            models=self._models(step),
            files=self._config_files(step.spec),
        )

    def _cut(self, step: Step, inputs: Inputs, values: dict[str, Any]) -> StagePlan:
        spec = step.spec
        shards = [ShardRange(index=0, start=0, stop=0)]
        if spec.kind == "shard":
            rows = sum(f.rows or 0 for f in inputs.records[spec.reads[0].rstrip("?")])
            size = spec.shard_rows(self.config)
            shards = [
                ShardRange(index=n, start=start, stop=min(start + size, rows))
                for n, start in enumerate(range(0, rows, size))
            ]
        return StagePlan(
            stage=spec.name, round=step.round, fingerprint=fingerprint(values), ingredients=values, shards=shards
        )
