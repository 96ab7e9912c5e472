"""The run loop: for every stage skip what is complete, set up, run, mark complete."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import config_file
from pipeline.agenda import agenda, intention
from pipeline.aside import Aside
from pipeline.commit import refused_path, write_manifest
from pipeline.config_digests import config_files
from pipeline.console import Display
from pipeline.damage import no_longer
from pipeline.events import Events
from pipeline.executor import Executor
from pipeline.executor_errors import Defect, ending
from pipeline.executors import EXECUTORS, Place
from pipeline.existing import recordable
from pipeline.history import last_error
from pipeline.launch import follow, gathered, launch_of
from pipeline.lease import Lease, LeaseLost
from pipeline.makers import Makers
from pipeline.models import Models
from pipeline.plan import Planner, State, waits_for
from pipeline.preflight import look_at_models, look_at_sources, notes_on, preflight
from pipeline.report import refresh_report
from pipeline.run_stage import StageRunner
from pipeline.rundir import KeptDir, RunDir
from pipeline.selection import Selection
from pipeline.signals import StopSignals
from pipeline.storage import ensure_usable, storage_error
from schemas import files
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import Machine
from stages.schedule import Step
from stages.sources import Batch
from stages.spec import StageSpec


@dataclass
class RunOutcome:
    """What a run did. hosted: another machine ran it, and trained here too."""

    ran: list[Step] = field(default_factory=list)
    skipped: list[Step] = field(default_factory=list)
    seconds: float = 0.0
    hosted: bool = False


def run(config: RunConfig, selection: Selection, display: Display) -> RunOutcome:
    """Bring the selected stages up to date.

    Raises UserError (something to fix), Defect (not to be fixed by the user), Interrupted (asked to stop).
    """
    rundir, launch = RunDir(config.folder), launch_of(config)
    begun = time.monotonic()
    if launch is not None and launch.rank:
        follow(config, launch, display)
        return RunOutcome(hosted=True)
    try:
        with StopSignals() as signals, gathered(config, launch, display) as machines:
            ensure_usable(rundir.root)
            rundir.refuse_place()
            with Lease(rundir.root, display.say) as lease:
                try:
                    outcome = _Loop(config, rundir, selection, display, lease, signals, machines).run()
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
    """What `run` would do, without doing it, and what there is to say of the files and models it would read (`notes_on`,
    `look_at_models`). Raises UserError where `run` would, before it does anything."""
    rundir = RunDir(config.folder)
    rundir.refuse_place()
    models = Models(config, rundir)
    planner = Planner(config, rundir, models.digests, lambda spec: config_files(spec, config))
    if any(step.spec.models for step in selection.of(planner.steps)):
        models.start()
    states = agenda(planner, selection)
    work, opened = _with_work(states, selection), list[Iterator[Batch]]()
    if work:
        specs, launch = [state.step.spec for state in work], launch_of(config)
        preflight(config, specs)
        opened = look_at_sources(config, specs)
        EXECUTORS[config.execution.on].reach(config, specs, launch.count if launch else 1)
    returning = {
        file.path for state in states if state.kind == "kept" and state.manifest for file in state.manifest.files
    }
    for state in work:
        if state.plan is not None and not state.behind:
            check_inputs(rundir, models, state, returning)
        (state.aside or rundir).parts(
            state.step.spec, state.step.round, state.committed
        )  # the run reads them when it goes on
    return states, lambda: notes_on(opened) + look_at_models(config, models, [state.step for state in work])


def _with_work(states: list[State], selection: Selection) -> list[State]:
    return [s for s in states if s.kind != "done" or s.step.spec.name in selection.force]


class _Loop:
    def __init__(
        self,
        config: RunConfig,
        rundir: RunDir,
        selection: Selection,
        display: Display,
        lease: Lease,
        signals: StopSignals,
        machines: Callable[[Path], tuple[Machine, ...]],
    ) -> None:
        self.lease, self.signals, self.machines = lease, signals, machines
        self.config, self.rundir, self.selection, self.display = config, rundir, selection, display
        self.models = Models(config, rundir)
        self.planner = Planner(config, rundir, self.models.digests, lambda spec: config_files(spec, config))
        self.events = Events(rundir.events)
        self.steps = selection.of(self.planner.steps)
        self.aside = Aside(rundir)
        self.stages = StageRunner(config, rundir, self.models, self.planner, self.events, display, lease)

    def run(self) -> RunOutcome:
        with self.display.busy("looking at models and at what is there"):
            if any(step.spec.models for step in self.steps):
                self.models.start()
            self.aside.mend((step.spec, step.round) for step in self.planner.steps)
            states = agenda(self.planner, self.selection)
        outcome = RunOutcome()
        work = _with_work(states, self.selection)
        if not work:
            self.rundir.forget_forced()
            outcome.skipped = list(self.steps)
            self._clean()  # a kill may have come while the report was written
            self._keep_config()
            self._keep_names(states)
            if last_error(self.rundir.root, running=False) is not None:
                self.events.add("run_ended", ok=True, exit_code=0)
            self._report()
            return outcome
        with self.display.busy("looking at models"):
            preflight(self.config, [state.step.spec for state in work])
            look_at_sources(self.config, [state.step.spec for state in work])
            notes = look_at_models(self.config, self.models, [state.step for state in work])
        for note in notes:
            self.display.say(note)
        self._clean()
        self._keep_config()
        self._keep_names(states)
        executor = self._executor([state.step.spec for state in work])
        self.events.add("run_started", stages=[s.title for s in self.steps])
        try:
            try:
                for step in self.steps:
                    (outcome.ran if self._bring_up_to_date(step, executor) else outcome.skipped).append(step)
            except (UserError, Defect) as error:
                executor.close()
                if not isinstance(error, LeaseLost):
                    self._report_in_spite()
                raise
            executor.close()  # what is loaded need not wait for the report
            self._report()
        except BaseException as error:
            executor.close()
            with suppress(OSError):  # of a full disk: the error itself is what must be heard
                if not isinstance(error, LeaseLost):
                    self._clean()
                if not self.lease.is_anothers():  # so are the events
                    self.events.add("run_ended", **ending(error))
            raise
        finally:
            executor.close()
        shutil.rmtree(self.rundir.temporary / self.lease.nonce, ignore_errors=True)
        self.rundir.forget_forced()
        self.events.add("run_ended", ok=True, exit_code=0)
        return outcome

    def _keep_names(self, states: list[State]) -> None:
        """What is current was made with models that the config may name otherwise now: these names are what it is known by from here on."""
        makers = Makers(self.config)
        for state in states:
            if (
                state.kind == "done"
                and state.plan is not None
                and state.plan.models != (named := makers.named(state.step))
            ):
                place = self.rundir.state(state.step.spec, state.step.round) / "plan.json"
                write_manifest(place, state.plan.model_copy(update={"models": named}).model_dump())

    def _executor(self, specs: list[StageSpec]) -> Executor:
        """Where execution.on says."""
        place = Place(self.rundir.root, self.rundir.logs, self.signals, self.machines(self.rundir.temporary))
        return EXECUTORS[self.config.execution.on].start(self.config, specs, place)

    def _report(self) -> None:
        if refresh_report(self.config, self.rundir, self.planner.of_what_is_there()):
            self.events.add("report_written", path=str(self.rundir.report))

    def _report_in_spite(self) -> None:
        """After a failure the page shows what there is: the failure itself is what must be heard."""
        try:
            self._report()
        except (UserError, Defect) as error:
            self.display.say(f"The report could not be written: {error}", "yellow")

    def _keep_config(self) -> None:
        """run.yaml says what the run directory is asked to hold; what it holds of other settings is not current."""
        text = config_file.dump(recordable(self.config))
        if not self.rundir.config.exists() or self.rundir.config.read_text(encoding="utf-8") != text:
            files.write_text(self.rundir.config, text)

    def _bring_up_to_date(self, step: Step, executor: Executor) -> bool:
        """Run one step if it needs it. Returns whether anything was done."""
        state = self.planner.state(step)
        spec, round_ = step.spec, step.round
        forced = spec.name in self.selection.force and not self.rundir.was_forced(spec, round_)
        if state.kind == "done" and not forced:
            return False
        if state.behind:  # what it reads was lost since the agenda was made
            raise UserError(f"Stage {step.title} cannot run: it {waits_for(state)}", fix="Run the same command again.")
        if missing := self.models.missing(step):
            raise UserError(
                f"Stage {step.title} cannot run: it needs the model that {', '.join(missing)} makes",
                fix="Run the earlier stages first (leave --stage and --from out).",
            )
        lost = state.kind == "changed" and spec.expensive and self.rundir.has_work(spec, round_)
        if lost and not self._forced_up_to(step):
            raise UserError(
                f"Finished work of stage {step.title} was made from other inputs ({'; '.join(state.why)})",
                where=str(self.rundir.root),
                fix=f"Repeat with --force-stage {spec.name} to redo it and what follows.",
            )
        check_inputs(self.rundir, self.models, state)  # before anything is moved
        self.lease.check()
        if state.kind in ("changed", "kept") or state.aside or forced:
            self.display.say(f"{step.title}: {intention(state, self.selection)}", "yellow")
        if state.kind == "changed" or state.aside or (forced and state.kind != "new"):
            self._make_room(step)
        if state.aside and not forced:
            self.aside.take(spec, round_, state.aside.entry)
            self.events.add("stage_brought_back", stage=spec.name, round=round_)
        if state.kind == "kept" and not forced:
            return True
        if forced:
            self.rundir.mark_forced(spec, round_)
            state.committed = {}
        assert state.plan is not None
        folder = self.rundir.state(spec, round_)
        files.remove([folder / "_stage.json"])  # its parts are about to change
        write_manifest(folder / "plan.json", state.plan.model_dump())
        try:
            self.stages.run(step, state, executor)
        except BaseException:
            self._put_back(step)
            raise
        self.aside.prune(spec, round_, self.config.execution.keep_results)
        return True

    def _make_room(self, step: Step) -> None:
        """Put what the stage made with other settings aside; what is not worth it is forgotten."""
        if self.rundir.stage(step.spec, step.round) or self.rundir.has_work(step.spec, step.round):
            self.aside.put(step.spec, step.round)
        self.rundir.clear(step.spec, step.round)

    def _put_back(self, step: Step) -> None:
        """After a failure that left nothing: what was finished with other settings lies where it lay."""
        spec, round_ = step.spec, step.round
        before = self.aside.latest(spec, round_)
        if before is None or self.rundir.has_work(spec, round_):
            return
        with suppress(OSError, LeaseLost):  # the failure itself is what must be heard
            self.lease.check()
            self.rundir.clear(spec, round_)
            if (refused := refused_path(self.rundir, spec, round_)).is_file():  # why it failed is still to be looked at
                os.replace(refused, refused_path(KeptDir(self.rundir.root, before), spec, round_))
            self.aside.take(spec, round_, before)
            self.rundir.forget_forced(spec, round_)

    def _forced_up_to(self, step: Step) -> bool:
        """Whether the step or an earlier one of its round or before was forced."""
        upto = self.steps[: self.steps.index(step) + 1]
        return any(s.spec.name in self.selection.force for s in upto)

    def _clean(self) -> None:
        """Remove what a killed run left unfinished. Safe: we hold the lease."""
        for leftover in self.rundir.leftovers():
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def check_inputs(rundir: RunDir, models: Models, state: State, returning: Set[str] = frozenset()) -> None:
    """Raise UserError for a file the step reads that is no longer what was written, and for an empty first table.

    returning: paths of files that lie aside and are going to be brought back: they are not in their place yet.
    """
    step = state.step
    for name, records in state.inputs.records.items():
        for bad in rundir.verify([record for record in records if record.path not in returning]):
            raise no_longer(f"part of {name}", rundir.root / bad.path)
    for bad in rundir.verify(models.files(step)):
        raise no_longer("file of the trained model", rundir.root / bad.path)
    first = step.spec.reads[0] if step.spec.kind == "shard" else ""
    if first and state.plan is not None and not state.plan.shards:
        raise UserError(
            f"Stage {step.title} has nothing to do: {first} is empty",
            fix="See what was dropped and why with `congrad status`.",
        )
