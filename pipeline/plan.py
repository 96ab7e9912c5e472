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
from stages.catalog import BY_NAME, STAGES, StageSpec, config_value

EXPENSIVE = frozenset({"sft", "generate", "judge", "aggregate", "gradients", "train"})


@dataclass(frozen=True)
class Step:
    """One stage of one round."""

    spec: StageSpec
    round: int

    @property
    def title(self) -> str:
        return f"{self.spec.name} (round {self.round})" if self.round else self.spec.name


def schedule(config: RunConfig) -> list[Step]:
    """The steps of a run in order. Imported pairs need no generation and no judging."""
    skipped = set()
    if config.imported:
        skipped = {"generate", "judge"} | ({"prompts"} if not config.prompts.sources else set())
    specs = [spec for spec in STAGES if spec.name not in skipped and spec.is_part_of(config)]
    first = [Step(s, 0) for s in specs if not s.per_round and s.name != "report"]
    rounds = [Step(s, k) for k in range(config.rounds) for s in specs if s.per_round]
    return [*first, *rounds, Step(BY_NAME["report"], 0)]


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
        if step.spec.name == "report":
            return self._everything()
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

    def _everything(self) -> Inputs:
        found = Inputs()
        for step in self.steps:
            manifest = self.manifest(step) if step.spec.name != "report" else None
            for table in step.spec.writes if manifest else ():
                name = f"{table}:{step.round}" if step.spec.per_round else table
                found.records[name] = manifest.table_files(table) if manifest else []
        return found

    def manifests(self) -> list[StageManifest]:
        """Manifests of all finished steps but the report, in order."""
        return [m for s in self.steps if s.spec.name != "report" and (m := self.manifest(s))]

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
        return any(state.glob("part-*.json")) or (
            step.spec.name in ("sft", "train") and any(folder.glob("checkpoints/*"))
        )

    def _ingredients(self, step: Step, inputs: Inputs) -> dict[str, Any]:
        values = ingredients(
            step.spec,
            self.config,
            step.round,
            inputs=inputs.contents(),
            models=self._models(step),
            files=self._config_files(step.spec),
        )
        if step.spec.name == "report":
            values["manifests"] = [m.fingerprint for m in self.manifests()]
        return values

    def _cut(self, step: Step, inputs: Inputs, values: dict[str, Any]) -> StagePlan:
        spec = step.spec
        shards = [ShardRange(index=0, start=0, stop=0)]
        if spec.kind == "shard":
            rows = sum(f.rows or 0 for f in inputs.records[spec.reads[0].rstrip("?")])
            size = config_value(self.config, spec.size or f"{spec.name}.shard_size")
            shards = [
                ShardRange(index=n, start=start, stop=min(start + size, rows))
                for n, start in enumerate(range(0, rows, size))
            ]
        return StagePlan(
            stage=spec.name, round=step.round, fingerprint=fingerprint(values), ingredients=values, shards=shards
        )
