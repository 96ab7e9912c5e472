"""`compare --train`: selections trained and evaluated at equal steps, by the product's own stages, with several seeds.

Every arm and seed is a run of its own, forked from the run that is compared: it shares pairs, gradients and scores, and selects, trains and
evaluates for itself. So a stopped comparison goes on where it was, and each of its models can be looked at with the commands there are.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import polars as pl

from pipeline.arms import ArmSpec, arms_of
from pipeline.compare import trained_alone
from pipeline.config_file import load_config
from pipeline.console import Display
from pipeline.existing import config_of
from pipeline.fork import fork
from pipeline.inspect import table_files
from pipeline.loop import run
from pipeline.rundir import RunDir
from pipeline.selection import Selection
from pipeline.status import recorded_planner
from schemas.config import RunConfig
from schemas.config.base import semantic_values
from schemas.errors import UserError
from schemas.files import publishing
from stages.contract import Silent
from stages.train.batches import steps_of

UNTRAINED = "untrained"
LAST = "evaluate"
_EQUAL = ("rounds", "select.seed", "train.seed", "train.epochs", "train.max_steps", "train.batch_size")
"""What is the same for all arms, so that their trainings differ in what is compared alone."""


@dataclass(frozen=True)
class Trial:
    """One arm with one seed, and the run that it is."""

    arm: ArmSpec
    seed: int
    folder: Path
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Trials:
    """All of them. steps: of every training, or of each of its objectives, where there are any; rows: arm, seed, split, language, metric, value,
    n, as evaluated; folder: where they and the tables lie."""

    folder: Path
    steps: int
    trials: list[Trial]
    rows: pl.DataFrame
    objectives: int = 0

    @property
    def length(self) -> str:
        """How long every training is, in words."""
        return _length(self.steps, self.objectives)


def trained(source: Path, arms: Sequence[str], seeds: int, out: Path | None, display: Display) -> Trials:
    """Train and evaluate every arm with seeds 0 .. seeds-1; what is finished is not repeated.

    arms: see `pipeline.arms`; out: folder of the runs (default: `NAME-trained` beside the run). Raises UserError where the run has no
    current scores, where an arm cannot be selected or changes what is the same for all, and where `out` holds runs of other settings.
    """
    source = source.resolve()
    config = config_of(source)
    if config.rounds > 1:
        raise UserError(
            "Selections of a run of several rounds cannot be trained side by side", where="rounds", fix="Use rounds: 1."
        )
    folder = out or source.parent / f"{source.name}-trained"
    specs = arms_of(arms)[1:]
    if not specs:
        raise UserError(
            "There is nothing to train", where="--train", fix="Name selections: --train conflict,random,all."
        )
    if any(spec.name == UNTRAINED for spec in specs):
        raise UserError(
            f"{UNTRAINED!r} is the model before training", where="--arm", fix="Call the selection otherwise."
        )
    _refuse_unequal(source, config, specs)
    steps, objectives = _steps(source, config, specs, display), len(config.train.orthalign.objectives)
    trials = planned(folder, config, specs, seeds, steps)
    length = _length(steps, objectives)
    display.say(f"{len(trials)} trainings of {length}, {len(specs)} selections with {seeds} seeds, in {folder}")
    for trial in trials:
        _prepare(source, trial)
    for number, trial in enumerate(trials, start=1):
        display.say(f"{number} of {len(trials)}: {trial.arm.name}, seed {trial.seed}", "bold")
        command = f"congrad run {shlex.quote(str(trial.folder / 'run.yaml'))}"
        run(config_of(trial.folder), Selection(last=LAST, command=command), display)
    rows = evaluated(trials)
    if rows.is_empty():
        display.say(
            "Nothing was measured: the run has no held-out pairs (test_fraction) and no authored ones", "yellow"
        )
    with publishing(folder / "evaluation.parquet") as temporary:
        rows.write_parquet(temporary)
    return Trials(folder, steps, trials, rows, objectives)


def planned(folder: Path, config: RunConfig, arms: Sequence[ArmSpec], seeds: int, steps: int) -> list[Trial]:
    """Every arm with every seed: one seed of all arms before the next. A drawn selection is drawn anew with every seed."""
    names = _folders(arms)
    trials = []
    for seed in range(seeds):
        for arm, name in zip(arms, names, strict=True):
            by = next(
                (s.removeprefix("select.by=") for s in reversed(arm.settings) if s.startswith("select.by=")),
                config.select.by,
            )
            drawn = (f"select.seed={seed}",) if by == "random" else ()
            length = (f"train.max_steps={steps}", "train.epochs=1.0")
            settings = (*arm.settings, *drawn, f"train.seed={seed}", *length)
            trials.append(Trial(arm, seed, folder / f"{name}-seed{seed}", settings))
    return trials


def _folders(arms: Sequence[ArmSpec]) -> list[str]:
    """A name for each arm's folders that a file system takes, no two the same."""
    names: list[str] = []
    for arm in arms:
        plain = re.sub(r"[^A-Za-z0-9.=_-]+", "-", arm.name).replace("=", "-").strip("-._")[:60] or "arm"
        names.append(plain if plain.casefold() not in map(str.casefold, names) else f"{plain}-{len(names) + 1}")
    return names


def _refuse_unequal(source: Path, config: RunConfig, arms: Sequence[ArmSpec]) -> None:
    """Raise UserError for an arm that says of itself what the comparison says of all."""
    for arm in arms:
        own = config_of(source, arm.settings)
        changed = [key for key in _EQUAL if attrgetter(key)(own) != attrgetter(key)(config)]
        if len(own.train.orthalign.objectives) != len(config.train.orthalign.objectives):
            changed.append("the number of train.orthalign.objectives")
        if changed:
            raise UserError(
                f"The arm {arm.name!r} sets what is the same for all that are trained: {', '.join(changed)}",
                where="--arm",
                fix="Leave it out. Seeds are counted by --seeds; for another length, compare a run that has it: congrad fork RUN NEW --set key=value.",
            )


def _steps(source: Path, config: RunConfig, arms: Sequence[ArmSpec], display: Display) -> int:
    """Optimizer steps of every training, or of each of its objectives: the config's, or its epochs over the fewest pairs that one of them has.

    A drawn selection is counted as the run's own seed draws it, so that a comparison goes on with more seeds.
    """
    counts = trained_alone(source, arms, Silent(display.say))
    return steps_of(min(n for one in counts for n in one.values()), config.train)


def _length(steps: int, objectives: int) -> str:
    return f"{steps:,} steps" + (f" of each of {objectives} objectives" if objectives else "")


def _prepare(source: Path, trial: Trial) -> None:
    """Fork the run for the trial, or make sure that what is there is this very trial."""
    if not trial.folder.exists():
        trial.folder.parent.mkdir(parents=True, exist_ok=True)
        fork(source, trial.folder.resolve(), trial.settings)
        return
    wanted = load_config(source / "run.yaml", [*trial.settings, f'name="{trial.folder.name}"'], trial.folder.parent)
    there = config_of(trial.folder)
    here = RunDir(trial.folder)
    same = semantic_values(there) == semantic_values(wanted)
    for state in recorded_planner(wanted, source).current() if same else ():
        made = here.stage(state.step.spec, state.step.round)
        same = same and (made is None or state.manifest is None or made.content == state.manifest.content)
    if not same:
        raise UserError(
            "This run was made from other settings or other tables than are compared now",
            where=str(trial.folder),
            fix="Delete the folder it lies in, or compare into another one: --out FOLDER.",
        )


def evaluated(trials: Sequence[Trial]) -> pl.DataFrame:
    """What the trials measured before (arm `untrained`, once a seed) and after training."""
    frames = []
    for trial in trials:
        files = table_files(trial.folder, "evaluation", 0)
        rows = pl.read_parquet(files, glob=False).filter(pl.col("model").is_in(["before", "after", "after vs before"]))
        name = pl.when(pl.col("model") == "before").then(pl.lit(UNTRAINED)).otherwise(pl.lit(trial.arm.name))
        frames.append(
            rows.select(
                name.alias("arm"), pl.lit(trial.seed).alias("seed"), "split", "language", "metric", "value", "n"
            )
        )
    rows = pl.concat(frames).unique(["arm", "seed", "split", "language", "metric"], keep="first", maintain_order=True)
    order = {arm: n for n, arm in enumerate(dict.fromkeys([*(t.arm.name for t in trials), UNTRAINED]))}
    return rows.sort(pl.col("arm").replace_strict(order, return_dtype=pl.Int64), "seed", maintain_order=True)
