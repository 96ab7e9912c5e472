"""`compare --train`: selections trained and evaluated at equal steps, by the product's own stages, with several seeds.

Every arm and seed is a run of its own, forked from the run that is compared: it shares pairs, gradients and scores, and selects, trains and
evaluates for itself. So a stopped comparison goes on where it was, and each of its models can be looked at with the commands there are.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import polars as pl

from pipeline.arms import ArmSpec, arms_of
from pipeline.compare import config_of_arm, trained_alone
from pipeline.config_file import load_config
from pipeline.console import Display
from pipeline.existing import config_of
from pipeline.fingerprint import changed_settings
from pipeline.fork import fork
from pipeline.inspect import table_files
from pipeline.loop import run
from pipeline.rundir import RunDir
from pipeline.selection import Selection
from pipeline.status import recorded_planner
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.files import publishing
from stages.contract import Silent
from stages.train.batches import steps_of

UNTRAINED = "untrained"
LAST = "evaluate"
_STEPS, _FORGETTING = "train.max_steps", "train.allo.forget_max_steps"
_EPOCHS = {_STEPS: "train.epochs", _FORGETTING: "train.allo.forget_epochs"}
"""What they take the place of, and what has no use beside them."""
_EQUAL = (
    "rounds",
    "select.seed",
    "train.seed",
    "train.epochs",
    _STEPS,
    "train.batch_size",
    "train.allo.learn",
    "train.allo.forget_epochs",
    _FORGETTING,
)
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
    """All of them. steps: of every training, or of each of its objectives, where there are any; forgetting: before them, where `train.allo`
    forgets; rows: arm, seed, split, language, metric, value, n, as evaluated; folder: where they and the tables lie."""

    folder: Path
    steps: int
    trials: list[Trial]
    rows: pl.DataFrame
    objectives: int = 0
    forgetting: int = 0

    @property
    def length(self) -> str:
        """How long every training is, in words."""
        parts = [f"{self.forgetting:,} steps of forgetting"] if self.forgetting else []
        parts += [f"{self.steps:,} steps" + (" of learning" if parts else "")] if self.steps else []
        return " and ".join(parts) + (f" for each of {self.objectives} objectives" if self.objectives else "")


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
    own = _configs(source, config, specs)
    fewest = _fewest(source, specs, display)
    lengths = [_lengths(one, fewest) for one in own]
    trials = planned(folder, specs, own, seeds, fewest)
    found = Trials(
        folder,
        max(one.get(_STEPS, 0) for one in lengths),
        trials,
        pl.DataFrame(),
        len(config.train.orthalign.objectives),
        max(one.get(_FORGETTING, 0) for one in lengths),
    )
    display.say(f"{len(trials)} trainings of {found.length}, {len(specs)} selections with {seeds} seeds, in {folder}")
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
    return replace(found, rows=rows)


def planned(folder: Path, arms: Sequence[ArmSpec], own: Sequence[RunConfig], seeds: int, fewest: int) -> list[Trial]:
    """Every arm with every seed: one seed of all arms before the next. A drawn selection is drawn anew with every seed.

    own: the arms' configs. fewest: pairs of the shortest training, which all are as long as.
    """
    names = _folders(arms)
    trials = []
    for seed in range(seeds):
        for arm, config, name in zip(arms, own, names, strict=True):
            drawn = (f"select.seed={seed}",) if config.select.by == "random" else ()
            parts = _lengths(config, fewest).items()
            length = [one for key, steps in parts for one in (f"{key}={steps}", f"{_EPOCHS[key]}=1.0")]
            settings = (*arm.settings, *drawn, f"train.seed={seed}", *length)
            trials.append(Trial(arm, seed, folder / f"{name}-seed{seed}", settings))
    return trials


def _lengths(config: RunConfig, fewest: int) -> dict[str, int]:
    """Key -> optimizer steps, for every part of a training: as many as over so many pairs."""
    train, allo = config.train, config.train.allo
    found = {_STEPS: steps_of(fewest, train)} if allo.learn or not allo.on else {}
    if allo.on and allo.forget:
        found[_FORGETTING] = steps_of(fewest, train.forgetting)
    return found


def _folders(arms: Sequence[ArmSpec]) -> list[str]:
    """A name for each arm's folders that a file system takes, no two the same."""
    names: list[str] = []
    for arm in arms:
        plain = re.sub(r"[^A-Za-z0-9.=_-]+", "-", arm.name).replace("=", "-").strip("-._")[:60] or "arm"
        free = (plain, *(f"{plain}-{n}" for n in range(len(names) + 1, len(names) + len(arms) + 1)))
        names.append(next(name for name in free if name.casefold() not in map(str.casefold, names)))
    return names


def _configs(source: Path, config: RunConfig, arms: Sequence[ArmSpec]) -> list[RunConfig]:
    """Those of the arms. Raises UserError for one that says of itself what the comparison says of all."""
    found = []
    for arm in arms:
        own = config_of_arm(source, arm)
        given = [setting.partition("=")[0] for setting in arm.settings]
        changed = [key for key in _EQUAL if attrgetter(key)(own) != attrgetter(key)(config) and _names(given, key)]
        if len(own.train.orthalign.objectives) != len(config.train.orthalign.objectives):
            changed.append("the number of train.orthalign.objectives")
        if changed:
            raise UserError(
                f"The arm {arm.name!r} sets what is the same for all that are trained: {', '.join(changed)}",
                where="--arm",
                fix="Leave it out. Seeds are counted by --seeds; for another length, compare a run that has it: congrad fork RUN NEW --set key=value.",
            )
        found.append(own)
    return found


def _names(given: Sequence[str], key: str) -> bool:
    """Whether the keys given have it, or a section it is in: one that an arm leaves without a use changes, too."""
    return any(f"{key}.".startswith(f"{one}.") for one in given)


def _fewest(source: Path, arms: Sequence[ArmSpec], display: Display) -> int:
    """Pairs of the training, or of the objective of one, that has the fewest.

    A drawn selection is counted as the run's own seed draws it, so that a comparison goes on with more seeds.
    """
    counts = trained_alone(source, arms, Silent(display.say))
    return min(n for one in counts for n in one.values())


def _prepare(source: Path, trial: Trial) -> None:
    """Fork the run for the trial, or make sure that what is there is this very trial."""
    if not trial.folder.exists():
        trial.folder.parent.mkdir(parents=True, exist_ok=True)
        fork(source, trial.folder.resolve(), trial.settings, "compare")
        return
    settings = [*trial.settings, f'name="{trial.folder.name}"']
    wanted = load_config(source / "run.yaml", settings, trial.folder.parent, leaves_out=lambda message: None)
    there = config_of(trial.folder)
    here = RunDir(trial.folder)
    if changed := changed_settings(there, wanted):
        more = f", and {len(changed) - 3} more" if changed[3:] else ""
        longer = any(line.startswith((_STEPS, _FORGETTING)) for line in changed)
        length = (
            ": its length is that of the selection with the fewest pairs, of all that are compared" if longer else ""
        )
        raise UserError(
            f"This training was made with other settings than it would have now ({'; '.join(changed[:3])}{more}){length}",
            where=str(trial.folder),
            fix="Compare into another folder (--out FOLDER), or the selections that were compared there.",
        )
    for state in recorded_planner(wanted, source).current():
        made = here.stage(state.step.spec, state.step.round)
        if made is not None and state.manifest is not None and made.content != state.manifest.content:
            raise UserError(
                f"This training was made from other tables than the run has now: {state.step.title} differs",
                where=str(trial.folder),
                fix="Compare into another folder: --out FOLDER.",
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
