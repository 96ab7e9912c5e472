"""The run loop: for every stage skip what is complete, set up, run, mark complete."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from pipeline import config_file, files
from pipeline.account import account_line, totals
from pipeline.commit import write_manifest
from pipeline.config_digests import config_files
from pipeline.console import Display, StageBar
from pipeline.events import Events, Meter
from pipeline.executor import LocalExecutor, Reports
from pipeline.executor_errors import ending
from pipeline.failures import Failures
from pipeline.fingerprint import content_of
from pipeline.lease import Lease, LeaseLost
from pipeline.models import Models
from pipeline.plan import EXPENSIVE, Planner, State, Step
from pipeline.preflight import preflight
from pipeline.rundir import RunDir
from pipeline.signals import StopSignals
from pipeline.storage import ensure_usable, storage_error
from pipeline.worker import Order
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.manifests import PartManifest, StageManifest, merge_tallies


@dataclass(frozen=True)
class Selection:
    """Which steps to run: all, one stage, a range of stages, one round; and which may be redone."""

    stage: str | None = None
    first: str | None = None
    last: str | None = None
    round: int | None = None
    force: tuple[str, ...] = field(default=())

    def of(self, steps: list[Step]) -> list[Step]:
        """The selected steps. Raises UserError on an unknown stage or an empty selection."""
        names = [s.spec.name for s in steps]
        for name in (self.stage, self.first, self.last, *self.force):
            if name is not None and name not in names:
                raise UserError(
                    f"This run has no stage {name!r}", fix=f"Its stages: {', '.join(dict.fromkeys(names))}."
                )
        order = list(dict.fromkeys(names))
        low = order.index(self.first) if self.first else 0
        high = order.index(self.last) if self.last else len(order) - 1
        chosen = [
            s
            for s in steps
            if (self.stage is None or s.spec.name == self.stage)
            and low <= order.index(s.spec.name) <= high
            and (self.round is None or s.round == self.round or not s.spec.per_round)
        ]
        if not chosen:
            raise UserError("Nothing is selected: look at --stage, --from, --until and --round")
        return chosen


@dataclass
class Outcome:
    """What a run did."""

    ran: list[Step] = field(default_factory=list)
    skipped: list[Step] = field(default_factory=list)
    seconds: float = 0.0


def run(config: RunConfig, selection: Selection, display: Display) -> Outcome:
    """Bring the selected stages up to date.

    Raises UserError (something to fix), StageFailed (a defect), Interrupted (asked to stop).
    """
    rundir = RunDir(config.folder)
    begun = time.monotonic()
    try:
        with StopSignals() as signals:
            ensure_usable(rundir.root)
            with Lease(rundir.root, display.say) as lease:
                outcome = _Loop(config, rundir, selection, display, lease, signals).run()
    except OSError as error:
        if (disk := storage_error(error, rundir.root)) is not None:
            raise disk from error
        raise
    outcome.seconds = time.monotonic() - begun
    return outcome


def preview(config: RunConfig, selection: Selection) -> list[State]:
    """What `run` would do, without doing it."""
    rundir = RunDir(config.folder)
    planner = Planner(config, rundir, Models(config, rundir).digests, lambda spec: config_files(spec, config))
    return [planner.state(step) for step in selection.of(planner.steps)]


class _Loop:
    def __init__(
        self,
        config: RunConfig,
        rundir: RunDir,
        selection: Selection,
        display: Display,
        lease: Lease,
        signals: StopSignals,
    ) -> None:
        self.lease, self.signals = lease, signals
        self.config, self.rundir, self.selection, self.display = config, rundir, selection, display
        self.models = Models(config, rundir)
        self.planner = Planner(config, rundir, self.models.digests, lambda spec: config_files(spec, config))
        self.events = Events(rundir.events)
        self.steps = selection.of(self.planner.steps)

    def run(self) -> Outcome:
        if any(step.spec.models for step in self.steps):
            self.models.start()
        states = self._refuse_lost_work()
        outcome = Outcome()
        if all(s.kind == "done" and s.step.spec.name not in self.selection.force for s in states):
            self.rundir.forget_forced()
            outcome.skipped = list(self.steps)
            return outcome
        redone = self.selection.force
        preflight(self.config, [s.step.spec for s in states if s.kind != "done" or s.step.spec.name in redone])
        self._clean()
        files.write_text(self.rundir.config, config_file.dump(self.config))
        self.events.add("run_started", stages=[s.title for s in self.steps])
        executor = LocalExecutor(self.config, self.rundir.logs, self.signals)
        try:
            for step in self.steps:
                (outcome.ran if self._bring_up_to_date(step, executor) else outcome.skipped).append(step)
        except BaseException as error:
            executor.close()
            with suppress(OSError):  # of a full disk: the error itself is what must be heard
                if not isinstance(error, LeaseLost):
                    self._clean()
                self.events.add("run_ended", **ending(error))
            raise
        finally:
            executor.close()
        self.rundir.forget_forced()
        self.events.add("run_ended", ok=True, exit_code=0)
        return outcome

    def _refuse_lost_work(self) -> list[State]:
        """States of the selected steps. Raises UserError before anything is done if hours of work would be redone."""
        states, tainted, forced = [], "", False
        for step in self.steps:
            state = self.planner.state(step)
            states.append(state)
            forced = forced or step.spec.name in self.selection.force
            cause = "; ".join(state.why) if state.kind == "changed" else tainted
            if cause and not forced and step.spec.name in EXPENSIVE and self.planner.has_work(step):
                raise UserError(
                    f"Finished work of stage {step.title} was made with other settings ({cause}) and would be redone",
                    where=str(self.rundir.root),
                    fix=f"Repeat with --force-stage {self._origin(states)} to redo it and what follows, "
                    "give the run another --run-dir or name, or undo the change.",
                )
            if state.kind == "changed":
                tainted = tainted or f"{step.title} changes: {cause}"
        return states

    def _origin(self, states: list[State]) -> str:
        return next(s.step.spec.name for s in states if s.kind == "changed")

    def _bring_up_to_date(self, step: Step, executor: LocalExecutor) -> bool:
        """Run one step if it needs it. Returns whether anything ran."""
        state = self.planner.state(step)
        if state.kind == "waiting":
            raise UserError(
                f"Stage {step.title} cannot run: it {'; '.join(state.why)}",
                fix="Run the earlier stages first (leave --stage and --from out).",
            )
        forced = step.spec.name in self.selection.force and not self.rundir.was_forced(step.spec, step.round)
        if forced and state.kind in ("done", "resume"):
            state = State(step, "changed", ["--force-stage"], state.plan, inputs=state.inputs)
        if state.kind == "done":
            return False
        if missing := self.models.missing(step):
            raise UserError(
                f"Stage {step.title} cannot run: it needs the model that {', '.join(missing)} makes",
                fix="Run the earlier stages first (leave --stage and --from out).",
            )
        if state.kind == "changed":
            allowed = self._forced_up_to(step)
            if step.spec.name in EXPENSIVE and self.planner.has_work(step) and not allowed:
                raise UserError(
                    f"Finished work of stage {step.title} was made from other inputs ({'; '.join(state.why)})",
                    where=str(self.rundir.root),
                    fix=f"Repeat with --force-stage {step.spec.name} to redo it and what follows.",
                )
            self._check_inputs(step, state)  # before anything is thrown away
            self.display.say(f"{step.title}: redone because {'; '.join(state.why)}", "yellow")
            self.rundir.clear(step.spec, step.round)
            if forced:
                self.rundir.mark_forced(step.spec, step.round)
        else:
            self._check_inputs(step, state)
        assert state.plan is not None
        self.lease.check()
        folder = self.rundir.state(step.spec, step.round)
        files.remove([folder / "_stage.json"])  # its parts are about to change
        write_manifest(folder / "plan.json", state.plan.model_dump())
        self._run_stage(step, state, executor)
        return True

    def _forced_up_to(self, step: Step) -> bool:
        """Whether the step or an earlier one of its round or before was forced."""
        upto = self.steps[: self.steps.index(step) + 1]
        return any(s.spec.name in self.selection.force for s in upto)

    def _check_inputs(self, step: Step, state: State) -> None:
        for name, records in state.inputs.records.items():
            for bad in self.rundir.verify(records):
                raise UserError(
                    f"This part of {name} is no longer what was written",
                    where=str(self.rundir.root / bad.path),
                    fix="Delete it and run again: the stage that made it makes that part anew.",
                )
        for bad in self.rundir.verify(self.models.files(step)):
            raise UserError(
                "This file of the trained model is no longer what was written",
                where=str(self.rundir.root / bad.path),
                fix="Delete it and run again: the stage that made it continues from its last checkpoint.",
            )
        first = step.spec.reads[0] if step.spec.kind == "shard" else ""
        if first and not state.plan.shards:  # type: ignore[union-attr]
            raise UserError(
                f"Stage {step.title} has nothing to do: {first} is empty",
                fix="See what was dropped and why with `python -m pipeline status`.",
            )

    def _run_stage(self, step: Step, state: State, executor: LocalExecutor) -> None:
        plan, parts = state.plan, dict(state.parts)
        assert plan is not None
        failures = Failures(self.rundir, step.spec, step.round, self.config.execution.max_failed_fraction)
        for index in failures.worth_another_try(parts):
            files.remove([self.rundir.state(step.spec, step.round) / f"part-{index:05d}.json"])
            del parts[index]
        pending = {s.index: s for s in plan.shards if s.index not in parts}
        models = self.models.of(step)
        order = Order(
            spec=step.spec,
            round=step.round,
            config=self.config,
            root=self.rundir.root,
            fingerprint=plan.fingerprint,
            inputs=state.inputs.records,
            models=models,
            shards=pending,
            manifests=self.planner.manifests() if step.spec.name == "report" else [],
        )
        self.events.add(
            "stage_started", stage=step.spec.name, round=step.round, parts=len(plan.shards), done=len(parts)
        )
        meter = Meter(self.events, step.spec.name, step.round)
        with self.display.stage(step.title) as bar:
            if step.spec.kind == "shard":
                rows = plan.shards[-1].stop
                done = rows - sum(s.stop - s.start for s in pending.values())
                bar.total(rows, "rows", done)
                meter.total(rows, "rows", done)
            if pending:
                executor.run(order, self._key(step, models), self._reports(step, bar, meter, parts, failures))
        failures.check(parts, finished=True)
        missing = [s.index for s in plan.shards if s.index not in parts]
        if missing:
            raise UserError(
                f"Stage {step.title} ended without its parts {missing[:5]}", fix="Run the same command again."
            )
        manifest = self._finish(step, plan.fingerprint, parts, {role: m.name for role, m in models.items()})
        self.events.add(
            "stage_done",
            stage=step.spec.name,
            round=step.round,
            seconds=manifest.seconds,
            rows=totals(manifest.tallies),
            stats=manifest.stats,
        )
        self.display.say(f"✓ {step.title}: {account_line(manifest)}", "green")

    def _key(self, step: Step, models: Mapping[str, object]) -> str | None:
        """Stages that run the engine with the same model share worker processes."""
        if not step.spec.engine or step.spec.kind != "shard":
            return None
        return repr((self.config.engine, self.config.text.max_length, sorted({m.digest for m in models.values()})))  # type: ignore[attr-defined]

    def _reports(
        self, step: Step, bar: StageBar, meter: Meter, parts: dict[int, PartManifest], failures: Failures
    ) -> Reports:
        def committed(part: PartManifest) -> None:
            parts[part.index] = part
            self.events.add(
                "part_done",
                stage=step.spec.name,
                round=step.round,
                part=part.index,
                seconds=part.seconds,
                rows=totals(part.tallies),
                stats=part.stats,
            )
            failures.check(parts, finished=False)

        def started(index: int) -> None:
            self.events.add("part_started", stage=step.spec.name, round=step.round, part=index)

        def note(message: str) -> None:
            self.events.add("note", stage=step.spec.name, round=step.round, message=message)
            bar.say(message)

        def total(amount: int, unit: str) -> None:
            if step.spec.kind != "shard":
                bar.total(amount, unit)
                meter.total(amount, unit)

        def advance(amount: int, rates: Mapping[str, float]) -> None:
            bar.advance(amount, rates)
            meter.advance(amount, rates)

        return Reports(
            total=total,
            advance=advance,
            note=note,
            started=started,
            committed=committed,
            tick=self.lease.check_heartbeat,
        )

    def _finish(
        self, step: Step, fingerprint: str, parts: dict[int, PartManifest], models: dict[str, str]
    ) -> StageManifest:
        """Write the stage's manifest: the driver's word that every part is in."""
        ordered = [parts[index] for index in sorted(parts)]
        records = [f for part in ordered for f in part.files]
        stats: dict[str, float] = {}
        for part in ordered:
            for name, value in part.stats.items():
                stats[name] = stats.get(name, 0.0) + value
        manifest = StageManifest(
            stage=step.spec.name,
            round=step.round,
            fingerprint=fingerprint,
            content=content_of(records),
            files=records,
            tallies=merge_tallies(t for part in ordered for t in part.tallies),
            stats=stats,
            seconds=round(sum(part.seconds for part in ordered), 3),
            models=models,
        )
        self.lease.check()
        self.rundir.sweep(step.spec, step.round, records)
        write_manifest(self.rundir.state(step.spec, step.round) / "_stage.json", manifest.model_dump())
        return manifest

    def _clean(self) -> None:
        """Remove what a killed run left unfinished. Safe: we hold the lease."""
        for leftover in self.rundir.leftovers():
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
