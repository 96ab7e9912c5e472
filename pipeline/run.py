"""The run loop: for every stage skip what is complete, set up, run, mark complete."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from pipeline import config_file
from pipeline.commit import write_manifest
from pipeline.config_digests import config_files
from pipeline.console import Display
from pipeline.events import Events
from pipeline.executor import Executor
from pipeline.executor_errors import ending
from pipeline.lease import Lease, LeaseLost
from pipeline.local_crew import local_executor
from pipeline.models import Models
from pipeline.plan import Planner, State
from pipeline.preflight import look_at_models, preflight
from pipeline.report import refresh_report
from pipeline.run_stage import StageRunner
from pipeline.rundir import RunDir
from pipeline.selection import Selection
from pipeline.signals import StopSignals
from pipeline.storage import ensure_usable, storage_error
from schemas import files
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.schedule import Step


@dataclass
class RunOutcome:
    """What a run did."""

    ran: list[Step] = field(default_factory=list)
    skipped: list[Step] = field(default_factory=list)
    seconds: float = 0.0


def run(config: RunConfig, selection: Selection, display: Display) -> RunOutcome:
    """Bring the selected stages up to date.

    Raises UserError (something to fix), StageFailed (a defect), Interrupted (asked to stop).
    """
    rundir = RunDir(config.folder)
    begun = time.monotonic()
    try:
        with StopSignals() as signals:
            ensure_usable(rundir.root)
            rundir.refuse_links()
            with Lease(rundir.root, display.say) as lease:
                try:
                    outcome = _Loop(config, rundir, selection, display, lease, signals).run()
                except FileNotFoundError:
                    lease.check()  # the directory was moved or cleaned: that is what must be heard
                    raise
    except OSError as error:
        if (disk := storage_error(error, rundir.root)) is not None:
            raise disk from error
        raise
    outcome.seconds = time.monotonic() - begun
    return outcome


def preview(config: RunConfig, selection: Selection) -> tuple[list[State], Callable[[], list[str]]]:
    """What `run` would do, without doing it, and a look at the models it would read (see `look_at_models`)."""
    rundir = RunDir(config.folder)
    models = Models(config, rundir)
    planner = Planner(config, rundir, models.digests, lambda spec: config_files(spec, config))
    states = [planner.state(step) for step in selection.of(planner.steps)]
    todo = [state.step for state in states if state.kind != "done"]
    return states, lambda: look_at_models(config, models, todo)


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
        self.stages = StageRunner(config, rundir, self.models, self.planner, self.events, display, lease)

    def run(self) -> RunOutcome:
        if any(step.spec.models for step in self.steps):
            self.models.start()
        states = self._refuse_lost_work()
        outcome = RunOutcome()
        if all(s.kind == "done" and s.step.spec.name not in self.selection.force for s in states):
            self.rundir.forget_forced()
            outcome.skipped = list(self.steps)
            self._clean()  # a kill may have come while the report was written
            self._report()
            return outcome
        redone = self.selection.force
        todo = [s.step for s in states if s.kind != "done" or s.step.spec.name in redone]
        preflight(self.config, [step.spec for step in todo])
        for note in look_at_models(self.config, self.models, todo):
            self.display.say(note)
        self._clean()
        files.write_text(self.rundir.config, config_file.dump(self.config))
        self.events.add("run_started", stages=[s.title for s in self.steps])
        executor = local_executor(self.config, self.rundir.logs, self.signals)
        try:
            for step in self.steps:
                (outcome.ran if self._bring_up_to_date(step, executor) else outcome.skipped).append(step)
            executor.close()  # what is loaded need not wait for the report
            self._report()
        except BaseException as error:
            executor.close()
            with suppress(OSError):  # of a full disk: the error itself is what must be heard
                if not isinstance(error, LeaseLost):
                    self._clean()
                self.events.add("run_ended", **ending(error))
            raise
        finally:
            executor.close()
        shutil.rmtree(self.rundir.temporary / self.lease.nonce, ignore_errors=True)
        self.rundir.forget_forced()
        self.events.add("run_ended", ok=True, exit_code=0)
        return outcome

    def _report(self) -> None:
        if refresh_report(self.config, self.rundir, self.planner):
            self.events.add("report_written", path=str(self.rundir.report))

    def _refuse_lost_work(self) -> list[State]:
        """States of the selected steps. Raises UserError before anything is done if hours of work would be redone."""
        states, tainted, forced = [], "", False
        for step in self.steps:
            state = self.planner.state(step)
            states.append(state)
            forced = forced or step.spec.name in self.selection.force
            cause = "; ".join(state.why) if state.kind == "changed" else tainted
            if cause and not forced and step.spec.expensive and self.planner.has_work(step):
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

    def _bring_up_to_date(self, step: Step, executor: Executor) -> bool:
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
            if step.spec.expensive and self.planner.has_work(step) and not allowed:
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
        self.stages.run(step, state, executor)
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
                fix="See what was dropped and why with `congrad status`.",
            )

    def _clean(self) -> None:
        """Remove what a killed run left unfinished. Safe: we hold the lease."""
        for leftover in self.rundir.leftovers():
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
