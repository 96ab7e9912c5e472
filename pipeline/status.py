"""`status`: reads manifests only, looks at no model and no table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.account import totals
from pipeline.agenda import intention
from pipeline.config_file import load_config
from pipeline.console import Display, Terminal, printable
from pipeline.history import last_error, progress
from pipeline.lease import holder_of
from pipeline.makers import Makers
from pipeline.manifest_files import uncollected
from pipeline.pace import in_words
from pipeline.plan import Planner, State
from pipeline.rundir import RunDir
from pipeline.selection import Selection
from pipeline.widths import in_parts, room, width_of
from schemas.config import RunConfig
from schemas.manifests import StagePlan
from stages.schedule import Step
from stages.text.words import duration

_SILENT = 5  # seconds
_COLUMNS = ("stage", "state", "parts", "rows in", "kept", "dropped", "failed", "time", "rows/s")
_SPARE = ("rows/s", "failed", "dropped")  # left out in this order where all do not fit; `failed` only if nothing did


def states_of(folder: Path) -> list[State]:
    """The state of every step, with models and source files taken as they were recorded."""
    return recorded_planner(load_config(folder / "run.yaml"), folder).states()


def recorded_planner(
    config: RunConfig, folder: Path, other: Callable[[str, int], str] = lambda role, round_: "another one"
) -> Planner:
    """A planner that answers from what was recorded: it looks at no model and at no source file. other: (role, round) -> content of a model that is
    named otherwise than it was."""
    rundir, makers = RunDir(folder), Makers(config)
    last = cache(lambda: Makers(load_config(folder / "run.yaml")))  # of plans that recorded no names

    def recorded(kind: str, plan: StagePlan | None) -> dict[str, str]:
        values = plan.ingredients if plan else {}
        return {name.removeprefix(kind): value for name, value in values.items() if name.startswith(kind)}

    def models(step: Step) -> dict[str, str]:
        plan = rundir.plan(step.spec, step.round)
        values = recorded("model ", plan)
        if plan is None:
            return values
        before = plan.models or last().named(step)
        return {
            role: values[role] if role in values and before.get(role) == name else other(role, step.round)
            for role, name in makers.named(step).items()
        }

    return Planner(config, rundir, models, lambda spec: recorded("file ", rundir.plan(spec, 0)))


def print_status(folder: Path, as_json: bool) -> None:
    """Print the state of a run."""
    with uncollected():  # the command ends with it
        _print_status(folder, as_json)


def _print_status(folder: Path, as_json: bool) -> None:
    states, holder = states_of(folder), holder_of(folder, Display(quiet=as_json).say)
    if as_json:
        print_json(folder, states, holder)
        return
    console = Terminal()
    print_states(states, console)
    if holder:
        console.print(Text(printable(f"Running now: process {holder['pid']} on {holder['host']}.")), soft_wrap=True)
    if holder and (now := progress(folder)):
        console.print(Text(printable(_progress_line(now))), soft_wrap=True)
        for place, at in now.get("places", {}).items() if len(now.get("places", {})) > 1 else ():
            console.print(
                Text(printable(f"  {place}: {at['done']:,} {now['unit']}, {at['per_s']:,.4g}/s")), soft_wrap=True
            )
    upcoming = next((s for s in states if s.kind != "done"), None)
    if upcoming is None:
        console.print("Everything is up to date.")
    else:
        console.print(Text(printable(f"Next: {upcoming.step.title} ({'; '.join(upcoming.why)}).")), soft_wrap=True)
    if (error := last_error(folder, bool(holder))) and upcoming is not None:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(error["time"]))
        console.print(Text(printable(f"Last error ({when}): {error['error']}"), style="red"), soft_wrap=True)


def _progress_line(event: dict[str, Any]) -> str:
    total = f" of {event['total']:,}" if event.get("total") else ""
    left = f", about {event['seconds_left']:,} s left" if event.get("seconds_left") is not None else ""
    rates = "".join(f", {rate}" for rate in in_words(event["rates"]))
    speed = f", {event['per_s']:,.4g}/s" if event["done"] else ""
    silent = f"; at work for {event['silent_s']:,} s since" if event["silent_s"] >= _SILENT else ""
    return f"{event['stage']}: {event['done']:,}{total} {event['unit']}{speed}{rates}{left}{silent}"


def print_states(states: list[State], console: Terminal | None = None) -> None:
    """A table of steps (state, parts, rows in, kept, dropped, failed, time), less what does not fit the terminal; below it why
    rows were dropped and why a step is not done, a line a step. Piped, nothing is left out or wrapped."""
    console = console or Terminal()
    width = room(console)
    cells: list[Sequence[str]] = []
    lines = []
    for state in states:
        rows: list[dict[str, Any]] = totals(state.manifest.tallies) if state.manifest else []
        parts = f"{state.parts_done}/{len(state.plan.shards)}" if state.plan and state.kind != "waiting" else ""
        first = rows[0] if rows else {}
        cells.append((state.step.title, state.kind, parts, *_cells(first), _time(state), _rate(first, state)))
        cells += [("", "", "", *_cells(row), "", "") for row in rows[1:]]
        lines += [f"{state.step.title}, {row['unit']}s dropped: {_reasons(row)}" for row in rows if row["dropped"]]
        if state.kind not in ("waiting", "new", "done") and state.why:
            lines.append(f"{state.step.title}: {'; '.join(state.why)}")
    for number, table in enumerate(_tables(cells, width)):
        if number:
            console.print()
        console.print(table)
    for line in lines:
        console.print(Text(printable(line), style="dim"), soft_wrap=not console.is_terminal)


def _tables(rows: Sequence[Sequence[str]], width: int) -> list[Table]:
    """One table without the spare columns that do not fit `width`, or all columns in several where that is not enough."""
    every = {name: [name, *cells] for name, *cells in zip(_COLUMNS, *rows, strict=True)}
    columns = dict(every)

    def fits() -> bool:
        return sum(1 + width_of(column) for column in columns.values()) - 1 <= width

    for name in _SPARE:
        if not fits() and (name != "failed" or set(columns[name][1:]) <= {"", "0"}):
            del columns[name]
    first, *others = (columns if fits() else every).values()
    tables = []
    for part in in_parts(others, width - width_of(first), 1):
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
        for name, *_ in (first, *part):
            table.add_column(name, justify="left" if name in _COLUMNS[:3] else "right", no_wrap=True)
        for cells in zip(first[1:], *(column[1:] for column in part), strict=True):
            table.add_row(*map(Text, cells))
        tables.append(table)
    return tables


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    if not row:
        return "", "", "", ""
    return (
        f"{row['in']:,} {row['unit']}s",
        f"{row['kept']:,}",
        f"{sum(row['dropped'].values()):,}",
        f"{row['failed']:,}",
    )


def _time(state: State) -> str:
    return duration(state.manifest.seconds) if state.manifest else ""


def _rate(row: dict[str, Any], state: State) -> str:
    seconds = state.manifest.seconds if state.manifest else 0.0
    if not row or not seconds:
        return ""
    rate = row["in"] / seconds
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _reasons(row: dict[str, Any]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in row["dropped"].items())


def print_intentions(states: list[State], selection: Selection) -> None:
    """What a run would do with each step, in the words it would say."""
    console = Terminal()
    for state in states:
        words = intention(state, selection) or "up to date"
        console.print(Text(printable(f"{state.step.title}: {words}")), soft_wrap=True)


def print_json(folder: Path, states: list[State], holder: dict[str, Any] | None) -> None:
    """The same as JSON on standard output; docs/events.md names the keys."""
    upcoming = next((s for s in states if s.kind != "done"), None)
    following = upcoming and {"stage": upcoming.step.spec.name, "round": upcoming.step.round, "why": upcoming.why}
    stages = [
        {
            "stage": s.step.spec.name,
            "round": s.step.round,
            "state": s.kind,
            "why": s.why,
            "parts_done": s.parts_done,
            "parts": len(s.plan.shards) if s.plan else None,
            "seconds": s.manifest.seconds if s.manifest else None,
            "stats": s.manifest.stats if s.manifest else {},
            "rows": totals(s.manifest.tallies) if s.manifest else [],
            "tallies": [t.model_dump() for t in s.manifest.tallies] if s.manifest else [],
        }
        for s in states
    ]
    value = {
        "run": folder.resolve().name,
        "done": upcoming is None,
        "running": holder,
        "progress": progress(folder) if holder else None,
        "next": following,
        "last_error": last_error(folder, bool(holder)),
        "stages": stages,
    }
    Terminal().write_json(value)
