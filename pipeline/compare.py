"""`compare`: other selections beside the run's own, at equal counts on one pool, from what is stored. Writes nothing into the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipeline.arms import OWN, ArmSpec, arms_of
from pipeline.damage import reading
from pipeline.existing import config_of
from pipeline.fingerprint import fingerprint, ingredients
from pipeline.plan import State, waits_for
from pipeline.selection import refuse_round
from pipeline.status import recorded_planner
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import Progress, Silent

if TYPE_CHECKING:
    from stages.compare.figures import Comparison
    from stages.compare.pool import Arm

DEFAULT = ("conflict", "random", "margin", "logp_margin", "mean_direction")
"""Compared with the run's own selection where nothing else is asked for, if the run has what they go by."""

_COMPARED = ("select", "conflict")
"""Sections whose settings may differ: what comes before them is stored as it is."""


def comparison(folder: Path, texts: Sequence[str], round_: int, progress: Progress, examples: int = 3) -> Comparison:
    """The run's own selection beside those of `texts` (see `pipeline.arms`), or beside the default ones.

    Raises UserError for an arm that cannot be read, that changes nothing, or that would need more than the run has stored.
    """
    config = config_of(folder)
    specs = arms_of(texts or [name for name in DEFAULT if name != config.select.by])
    for spec in specs:
        for key, _, value in (setting.partition("=") for setting in spec.settings):
            if key.partition(".")[0] not in _COMPARED:
                raise UserError(
                    f"{_who(spec)} cannot be compared: {key} is no setting of {' or '.join(_COMPARED)}",
                    where="--arm",
                    fix="For anything else: congrad fork RUN NEW --set key=value.",
                )
            if key == "conflict.target" and value.strip() != config.conflict.target:
                raise UserError(
                    f"{_who(spec)} cannot be compared: conflict.target is the same in all arms, since other pairs would need gradients",
                    where="--arm",
                    fix="In a run of its own: congrad fork RUN NEW --set conflict.target=….",
                )
    with reading(folder):
        return side_by_side(folder, specs, round_, progress, examples, default=not texts)


def side_by_side(
    folder: Path, specs: Sequence[ArmSpec], round_: int, progress: Progress, examples: int, *, default: bool = False
) -> Comparison:
    """These arms on one pool. default: nobody asked for them, so those that can rank no pair are left out, and said."""
    from stages.compare.figures import compared
    from stages.compare.pool import on_one_pool, why_not

    config = config_of(folder)
    with_own = any(spec.name == OWN for spec in specs)
    with TemporaryDirectory(prefix="congrad-compare-") as scratch:
        arms: list[Arm] = []
        anew = _Anew(Path(scratch), progress)
        for spec in specs:
            arm = _arm(folder, config, spec, round_, anew, with_own)
            if default and spec.name != OWN and (reason := why_not(arm, round_)):
                progress.note(f"{spec.name} is left out: {reason}")
                continue
            arms.append(arm)
        pool = on_one_pool(arms, round_)
        tables = {name: list(arms[0].inputs[name]) for name in ("pairs", "gradients")}
        return compared(arms, pool, tables, config.languages.codes, examples)


def trained_alone(folder: Path, specs: Sequence[ArmSpec], progress: Progress) -> list[dict[str, int]]:
    """Pairs that each arm trains on in a run of its own (see `stages.compare.lengths`). Raises UserError for one that cannot be selected."""
    from stages.compare.lengths import trained_on

    config = config_of(folder)
    _scored(recorded_planner(config, folder).states(), 0, ArmSpec(OWN, ()), folder)
    with TemporaryDirectory(prefix="congrad-compare-") as scratch:
        anew = _Anew(Path(scratch), progress)
        return [trained_on(_arm(folder, config, spec, 0, anew, False), 0) for spec in specs]


@dataclass
class _Anew:
    """Scores that a run has not, made in `scratch`: once for all arms that score alike."""

    scratch: Path
    progress: Progress
    _made: dict[str, Path] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    def scores(self, config: RunConfig, round_: int, inputs: Mapping[str, list[Path]], note: str) -> Path:
        from stages.compare.rescore import rescored

        settings = config.model_dump_json(exclude={"select"})
        if settings not in self._made:
            self.progress.note(note)
            folder = self.scratch / str(len(self._made))
            folder.mkdir()
            self._made[settings] = rescored(config, round_, inputs, folder, Silent(self._once))
        return self._made[settings]

    def _once(self, message: str) -> None:
        """What holds for the scores of several arms is said of the first."""
        if message not in self._said:
            self._said.add(message)
            self.progress.note(message)


def config_of_arm(folder: Path, spec: ArmSpec, said: Callable[[str], None] = lambda message: None) -> RunConfig:
    """The run's config with the arm's settings. said: told what has no use. Raises UserError that names the arm."""
    try:
        return config_of(folder, spec.settings, said)
    except UserError as error:
        raise UserError(f"{_who(spec)} cannot be compared: {error.what}", fix=error.fix) from error


def _arm(folder: Path, own: RunConfig, spec: ArmSpec, round_: int, anew: _Anew, with_own: bool) -> Arm:
    """The arm with the tables it selects from."""
    from stages.compare.pool import Arm

    config = config_of_arm(folder, spec, partial(_noted, anew.progress, spec.name)) if spec.settings else own
    states = recorded_planner(config, folder).states()
    scoring, selecting = _scored(states, round_, spec, folder), _maker(states, "curated", round_)
    if with_own and spec.settings and all(_same(state, config, own) for state in (scoring, selecting)):
        raise UserError(
            f"The arm {spec.name!r} selects as the run itself does, which is in the table already",
            fix="Leave it out. Settings of other stages need a run of their own: congrad fork RUN NEW --set key=value.",
        )
    inputs = {name: [folder / file.path for file in files] for name, files in scoring.inputs.records.items()}
    if scoring.kind == "done" and scoring.manifest is not None:
        scores = [folder / file.path for file in scoring.manifest.table_files("scores")]
    else:
        scores = [anew.scores(config, round_, inputs, f"{spec.name}: scored anew ({'; '.join(scoring.why)})")]
    tables = {name: files for name, files in inputs.items() if name in ("pairs", "gradients")}
    return Arm(spec.name, config, tables | {"scores": scores}, spec.settings)


def _scored(states: Sequence[State], round_: int, spec: ArmSpec, folder: Path) -> State:
    """The step that makes the scores. Raises UserError where there is nothing to make them from."""
    scoring = _maker(states, "scores", round_)
    if scoring.behind or scoring.inputs.missing:
        raise UserError(
            f"{_who(spec)} cannot be compared: stage {scoring.step.title} {waits_for(scoring)}",
            where=str(folder),
            fix="Bring the run up to date first: congrad run CONFIG."
            if spec.name == OWN
            else "An arm may differ in select and in conflict, but for conflict.target, whose pairs have no gradients here. For anything else:"
            " congrad fork RUN NEW --set key=value.",
        )
    return scoring


def _noted(progress: Progress, name: str, said: str) -> None:
    progress.note(f"{name}: {said}")


def _who(spec: ArmSpec) -> str:
    return "The run" if spec.name == OWN else f"The arm {spec.name!r}"


def _maker(states: Sequence[State], table: str, round_: int) -> State:
    makers = [state for state in states if table in state.step.spec.writes]
    refuse_round(round_, (state.step.round for state in makers), "--round")
    return next(state for state in makers if state.step.round == round_)


def _same(state: State, config: RunConfig, own: RunConfig) -> bool:
    """Whether both configs say the same to the stage."""
    spec, round_ = state.step.spec, state.step.round
    prints = [fingerprint(ingredients(spec, one, round_, inputs={}, models={}, files={})) for one in (config, own)]
    return prints[0] == prints[1]
