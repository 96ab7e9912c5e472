"""What a run is going to do, decided and said before it does anything: for `run` and for `run --dry-run`, in the same words."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.plan import Planner, State, waits_for
from pipeline.rundir import RunDir
from pipeline.selection import Selection
from schemas.errors import UserError
from stages.schedule import Step
from stages.text.words import duration


def agenda(planner: Planner, selection: Selection) -> list[State]:
    """States of the selected steps.

    Raises UserError if hours of finished work would be made anew without --force-stage, or if a step waits for one that is
    not selected.
    """
    every = planner.states()
    selected = set(selection.of(planner.steps))
    aside = {state.step for state in every if state.kind == "kept"} - selected
    states = [state for state in every if state.step in selected]
    forced = False
    for state in states:
        forced = forced or state.step.spec.name in selection.force
        _refuse_unmade(state, selected)
        _refuse_aside(state, [step for step in planner.sources(state.step) if step in aside])
        cause = state.cause
        lost = state.kind in ("changed", "stale") and planner.rundir.has_work(state.step.spec, state.step.round)
        if cause is not None and lost and state.step.spec.expensive and not forced:
            raise _would_be_redone(state, every, selection, planner.rundir)
    return states


def _refuse_unmade(state: State, selected: set[Step]) -> None:
    unmade = [behind for behind in state.behind if behind.step not in selected]
    if state.inputs.missing or unmade:
        raise UserError(
            f"Stage {state.step.title} cannot run: it {waits_for(State(state.step, state.kind, inputs=state.inputs, behind=unmade))}",
            fix="Run the earlier stages first (leave --stage and --from out).",
        )


def _refuse_aside(state: State, aside: Sequence[Step]) -> None:
    if aside and not state.is_current:
        names = ", ".join(step.title for step in aside)
        raise UserError(
            f"Stage {state.step.title} cannot run: what {names} made with these settings lies aside, and must be brought back first",
            fix="Run the earlier stages too (leave --stage and --from out): nothing of it is computed again.",
        )


def _would_be_redone(state: State, states: Sequence[State], selection: Selection, rundir: RunDir) -> UserError:
    upto = states[: states.index(state) + 1]
    changes = dict.fromkeys(why for s in upto if s.kind == "changed" for why in s.why)
    first = next(s.step.spec.name for s in upto if s.kind == "changed")
    after = [s for s in states if s.cause is not None and s.kind in ("changed", "stale")]
    return UserError(
        f"Finished work of stage {state.step.title} was made with other settings ({'; '.join(changes)}) and would"
        " be redone",
        where=str(rundir.root),
        fix=f"To redo {', '.join(s.step.title for s in after)} (last time {duration(sum(s.seconds for s in after))} of work): "
        f"{selection.redo.format(command=selection.command, stage=first)}. What is there is kept aside. "
        "Or give the run another --run-dir or name, or undo the change.",
    )


def intention(state: State, selection: Selection) -> str:
    """What happens to a step, in words; empty if nothing does."""
    forced = state.step.spec.name in selection.force
    took = f" (it took {duration(state.seconds)} last time)" if state.seconds >= 1 else ""
    if forced and state.kind in ("done", "resume", "kept"):
        return f"redone because of --force-stage{took}"
    match state.kind:
        case "done":
            return ""
        case "kept":
            return "brought back: it was finished with these settings before"
        case "changed":
            return f"redone because {'; '.join(state.why)}{took}"
        case "resume":
            return f"continued: {'; '.join(state.why)}"
        case "new":
            return "run for the first time"
        case _:
            behind = ", ".join(s.step.title for s in state.behind)
            known = state.kind == "stale"
            return f"after {behind}: " + (f"redone{took} unless it gives the same rows" if known else "run")
