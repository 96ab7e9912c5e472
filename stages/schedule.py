"""The steps of a run: which stages take part, in which order, in which round."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.config import RunConfig
from stages.catalog import STAGES
from stages.spec import StageSpec


@dataclass(frozen=True)
class Step:
    """One stage of one round."""

    spec: StageSpec
    round: int

    @property
    def title(self) -> str:
        """The stage, and the round after the first."""
        return f"{self.spec.name} (round {self.round})" if self.round else self.spec.name


def schedule(config: RunConfig) -> list[Step]:
    """The steps of a run in order: what all rounds share, then round by round."""
    specs = [spec for spec in STAGES if spec.is_part_of(config)]
    first = [Step(spec, 0) for spec in specs if not spec.per_round]
    return first + [Step(spec, number) for number in range(config.rounds) for spec in specs if spec.per_round]
