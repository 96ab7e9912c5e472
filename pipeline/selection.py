"""Which steps of a run are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from schemas.errors import UserError
from stages.schedule import Step


def refuse_round(round_: int, rounds: Iterable[int], where: str) -> None:
    """Raise UserError for a round that is none of the run's."""
    if round_ not in (there := sorted(set(rounds))):
        raise UserError(
            f"This run has no round {round_}", where=where, fix=f"Its rounds: {', '.join(map(str, there))}."
        )


@dataclass(frozen=True)
class Selection:
    """Which steps to run: all, one stage, a range of stages, one round; and which may be redone. command: the one that asked, to be
    quoted in advice; redo: how it says that a stage may be redone."""

    stage: str | None = None
    first: str | None = None
    last: str | None = None
    round: int | None = None
    force: tuple[str, ...] = field(default=())
    command: str = "congrad run CONFIG"
    redo: str = "{command} --force-stage {stage}"

    def of(self, steps: list[Step]) -> list[Step]:
        """The selected steps. Raises UserError on an unknown stage or an empty selection."""
        names = [s.spec.name for s in steps]
        for name in (self.stage, self.first, self.last, *self.force):
            if name is not None and name not in names:
                raise UserError(
                    f"This run has no stage {name!r}",
                    fix=f"Its stages: {', '.join(dict.fromkeys(names))}. (The report is a command: `congrad report RUN`.)",
                )
        if self.stage is not None and (self.first or self.last):
            raise UserError(
                "--stage runs one stage alone", where="--from, --until", fix="Leave --stage out, or --from and --until."
            )
        if self.round is not None:
            refuse_round(self.round, (s.round for s in steps if s.spec.per_round), "--round")
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
        if aside := next((name for name in self.force if name not in {s.spec.name for s in chosen}), None):
            raise UserError(
                f"Stage {aside} is to be forced, and is not among the stages that are selected",
                where="--force-stage",
                fix="Force what is selected, or select more: --stage, --from, --until, --round.",
            )
        return chosen
