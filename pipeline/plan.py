"""What a run consists of, and what of it is done: stages in order, their inputs, their state, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pipeline.fingerprint import content_of, differences, fingerprint, ingredients
from pipeline.makers import Makers
from pipeline.rundir import KeptDir, RunDir
from schemas.config import RunConfig
from schemas.manifests import FileRecord, ShardRange, StageManifest, StagePlan
from stages.schedule import Step, schedule
from stages.spec import StageSpec


@dataclass
class Inputs:
    """Tables a step reads, the files of each and the hash of their content; missing ones by the name of the stage that makes them."""

    records: dict[str, list[FileRecord]] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


Kind = Literal["done", "kept", "resume", "new", "changed", "stale", "waiting"]


@dataclass
class State:
    """What is known of a step.

    kind: done; kept: finished with these settings before, and kept aside; resume: half done; new; changed: made with other settings;
        stale: with these settings, but from what is no longer current; waiting: for what has not been made.
    manifest: of what is finished and current. seconds: of work that what is there took. committed: of a half-done one,
        its parts and the seconds that each took.
    behind: the steps whose results it reads and that are not current. aside: where its results lie, if they are kept aside.
    gone: which of its finished files are not there.
    """

    step: Step
    kind: Kind
    why: list[str] = field(default_factory=list)
    plan: StagePlan | None = None
    manifest: StageManifest | None = None
    committed: dict[int, float] = field(default_factory=dict)
    inputs: Inputs = field(default_factory=Inputs)
    behind: list[State] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    aside: KeptDir | None = None
    gone: str = ""
    _tables: dict[str, tuple[list[FileRecord], str]] = field(default_factory=dict, repr=False)

    def table(self, name: str) -> tuple[list[FileRecord], str]:
        """Files of a table of what is finished, in part order, and the hash of their content: found once, however many stages read it."""
        assert self.manifest is not None
        if name not in self._tables:
            records = self.manifest.table_files(name)
            self._tables[name] = records, content_of(records)
        return self._tables[name]

    @property
    def is_current(self) -> bool:
        """Whether what is finished of it was made with these settings, from what is current: the one rule of what may be shown."""
        return self.kind in ("done", "kept")

    @property
    def cause(self) -> State | None:
        """The first step made with other settings that this one goes back to; itself, if what it reads is current."""
        return self._cause_behind or (self if self.kind == "changed" else None)

    @cached_property
    def _cause_behind(self) -> State | None:
        return next((cause for behind in self.behind if (cause := behind.cause)), None)

    @cached_property
    def lost(self) -> str:
        """Which files are not there of the first finished step that this one goes back to and that lacks some; empty: of none."""
        return next((lost for behind in self.behind if (lost := behind.lost)), self.gone)

    @property
    def parts_done(self) -> int:
        return len(self.plan.shards) if self.is_current and self.plan else len(self.committed)


class Planner:
    """Looks at a run directory and says what each step needs. Writes nothing.

    models: (step) -> role -> digest, and files: (spec) -> name -> hash, are given by the caller, since
    finding them may need the models; `status` answers with what was recorded instead.
    """

    def __init__(
        self,
        config: RunConfig,
        rundir: RunDir,
        models: Callable[[Step], dict[str, str]],
        config_files: Callable[[StageSpec], dict[str, str]],
    ) -> None:
        self.config, self.rundir = config, rundir
        self.steps = schedule(config)
        self._models, self._config_files = models, config_files
        self._producer = {(table, s.round): s for s in self.steps for table in s.spec.writes}
        self._makers = Makers(config)

    def states(self, until: Step | None = None) -> list[State]:
        """The state of every step in order, up to `until`: one look, in which each answer builds on the earlier ones."""
        found: dict[Step, State] = {}
        self.rundir.foreseen.clear()
        for step in self.steps:
            found[step] = state = self._state(step, found)
            if state.kind == "kept" and state.manifest is not None:
                self.rundir.foreseen[step.spec.name, step.round] = state.manifest
            if step == until:
                break
        return list(found.values())

    def with_models(self, models: Callable[[Step], dict[str, str]]) -> Planner:
        """The same with other answers to which models there are."""
        return Planner(self.config, self.rundir, models, self._config_files)

    def of_what_is_there(self) -> Planner:
        """The same, without a look at models of steps that have made nothing: those are new, whatever the model, and it may have to be fetched."""
        return self.with_models(lambda step: self._models(step) if self.rundir.has_made(step.spec, step.round) else {})

    def state(self, step: Step) -> State:
        """The state of one step."""
        return self.states(step)[-1]

    def current(self) -> list[State]:
        """Steps whose results are finished, current and in their place: all that may be shown or given away."""
        return [state for state in self.states() if state.kind == "done"]

    def _state(self, step: Step, found: dict[Step, State]) -> State:
        inputs, behind = self._look(step, found)
        old = self.rundir.plan(step.spec, step.round)
        if inputs.missing or behind:
            state = State(step, "waiting", inputs=inputs, behind=behind, seconds=self._seconds(step, old))
            state.why = [waits_for(state)]
            if old is not None:
                own = self._own_differences(step, inputs, old)
                state.kind, state.plan, state.why = "changed" if own else "stale", old, own or state.why
            return state
        values = self._ingredients(step, inputs)
        print_ = fingerprint(values)
        if old is not None and old.fingerprint == print_:
            return self._as_planned(step, old, inputs, self.rundir)
        if (aside := self.rundir.kept_with(step.spec, step.round, print_)) is not None:
            plan = aside.plan(step.spec, step.round)
            if plan is not None and plan.fingerprint == print_:
                state = self._as_planned(step, plan, inputs, aside)
                state.aside = aside
                if state.kind == "done":
                    state.kind, state.why = "kept", ["finished with these settings before"]
                return state
        cut = self._cut(step, inputs, values)
        if old is None:
            return State(step, "new", ["not run yet"], cut, inputs=inputs)
        why, seconds = differences(old.ingredients, values), self._seconds(step, old)
        return State(step, "changed", why, cut, inputs=inputs, seconds=seconds)

    def _as_planned(self, step: Step, plan: StagePlan, inputs: Inputs, there: RunDir) -> State:
        """The state of a step whose plan is the one that lies `there`."""
        manifest = there.stage(step.spec, step.round)
        whole = manifest is not None and manifest.fingerprint == plan.fingerprint
        missing = ""
        if manifest and whole:
            if there.are_there(step.spec, step.round, manifest.files):
                return State(step, "done", plan=plan, manifest=manifest, inputs=inputs, seconds=manifest.seconds)
            gone = [file.path for file in manifest.files if not there.are_there(step.spec, step.round, [file])]
            more = f" and {len(gone) - 1} more files are" if len(gone) > 1 else " is"
            missing = f"{gone[0]}{more} gone or cut short" if gone else "files are gone"
        committed = there.committed(step.spec, step.round, plan.fingerprint)
        why = [f"it was finished, and {missing}"] if missing else []
        why.append(f"{len(committed)} of {len(plan.shards)} parts are done")
        seconds = sum(committed.values())
        return State(step, "resume", why, plan, committed=committed, inputs=inputs, seconds=seconds, gone=missing)

    def _look(self, step: Step, found: dict[Step, State]) -> tuple[Inputs, list[State]]:
        """The files of every table the step reads, and the steps that must be brought up to date first."""
        inputs, behind = Inputs(), []
        for read in step.spec.reads:
            name = read.rstrip("?")
            table, _, fixed = name.partition(":")
            producer = self._find(table, int(fixed) if fixed else step.round)
            if producer is None:
                if not read.endswith("?"):
                    inputs.missing.append(table)
                continue
            state = found[producer]
            if not state.is_current or state.manifest is None:
                behind.append(state)
            else:
                inputs.records[name], inputs.contents[name] = state.table(table)
        behind += [found[maker] for maker in self._makers.of(step) if maker in found and not found[maker].is_current]
        return inputs, list({state.step: state for state in behind}.values())

    def sources(self, step: Step) -> list[Step]:
        """The steps whose tables or models it reads."""
        reads = [read.rstrip("?").partition(":") for read in step.spec.reads]
        found = [self._find(table, int(fixed) if fixed else step.round) for table, _, fixed in reads]
        return list(dict.fromkeys([*filter(None, found), *self._makers.of(step)]))

    def _own_differences(self, step: Step, inputs: Inputs, old: StagePlan) -> list[str]:
        """What is other than it was, besides the inputs that are not current."""
        values = self._ingredients(step, inputs)
        unknown = {name for name in old.ingredients if name.startswith("input ") and name not in values}
        return differences({name: value for name, value in old.ingredients.items() if name not in unknown}, values)

    def _find(self, table: str, round_: int) -> Step | None:
        return self._producer.get((table, round_)) or self._producer.get((table, 0))

    def _seconds(self, step: Step, plan: StagePlan | None) -> float:
        """Of work that what is there took, whatever it was made with."""
        manifest = self.rundir.stage(step.spec, step.round)
        if manifest is not None or plan is None:
            return max(manifest.seconds, 0.001) if manifest else 0.0  # never nothing where something is: it is rounded
        return sum(self.rundir.committed(step.spec, step.round, plan.fingerprint).values())

    def _ingredients(self, step: Step, inputs: Inputs) -> dict[str, Any]:
        return ingredients(
            step.spec,
            self.config,
            step.round,
            inputs=inputs.contents,
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
            stage=spec.name,
            round=step.round,
            fingerprint=fingerprint(values),
            ingredients=values,
            shards=shards,
            models=self._makers.named(step),
        )


def waits_for(state: State) -> str:
    """What a step waits for, and why that is not there."""
    if state.inputs.missing:
        return f"waits for {', '.join(state.inputs.missing)}"
    titles = ", ".join(behind.step.title for behind in state.behind)
    if (cause := state.cause) is not None:
        return f"waits for {titles}, since {cause.step.title} was made with other settings: {'; '.join(cause.why)}"
    return f"waits for {titles}, since {state.lost}" if state.lost else f"waits for {titles}"


def not_current(state: State) -> str:
    """Why what is there of a step is not current."""
    why = "; ".join(state.why)
    return f"made with other settings than the run's now: {why}" if state.kind == "changed" else why
