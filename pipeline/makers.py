"""Which stage of the run makes the model that plays a role."""

from __future__ import annotations

from schemas.config import RunConfig
from stages.catalog import BY_NAME
from stages.schedule import Step


class Makers:
    """Answers from the config alone: looks at no file and no model."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def of(self, step: Step) -> list[Step]:
        """The steps whose models the step needs, in order."""
        makers = {self.maker(role, step.round) for role in step.spec.roles(self._config) if self.takes_part(role)}
        return sorted((maker for maker in makers if maker), key=lambda maker: (maker.round, maker.spec.name))

    def takes_part(self, role: str) -> bool:
        """sft and base only when merging, token_reward only when ALLO has a reward model, baseline and second_judge when they are given."""
        train, sft = self._config.train, self._config.sft
        if role in ("baseline", "second_judge", "token_reward"):
            return self._names(0)[role] is not None
        if role not in ("sft", "base"):
            return True
        facts = train.merge_facts
        if facts is None:
            return False
        own_base = sft.on and not facts.anchored  # the model the run starts from
        return role == "sft" or train.merge.base is not None or own_base

    def named(self, step: Step) -> dict[str, str]:
        """role -> how the config names the model, of the roles that take part: as it is given, or the stage that makes it."""
        found = {}
        for role in step.spec.roles(self._config):
            if self.takes_part(role):
                maker = self.maker(role, step.round)
                name, revision = self.given(role, step.round)
                found[role] = f"of {maker.title}" if maker else f"{name}@{revision}" if revision else name
        return found

    def given(self, role: str, round_: int) -> tuple[str, str | None]:
        """(name, revision) of the model from outside the run that plays a role which no stage makes."""
        name, model = self._names(round_).get(role), self._config.model
        return (name, None) if name else (model.policy, model.revision)

    def _names(self, round_: int) -> dict[str, str | None]:
        """role -> the model that the config gives it; None: none of its own."""
        model, train, evaluate = self._config.model, self._config.train, self._config.evaluate
        return self._config.judge.models | {
            "judge": model.judge,
            "evaluation_judge": model.evaluation_judge,
            "reference": self.given_reference(round_),
            "sft": train.merge.sft,
            "base": train.merge.base,
            "token_reward": train.allo.reward_model,
            "baseline": evaluate.baseline.model,
            "second_judge": evaluate.second_judge.model,
        }

    def given_reference(self, round_: int) -> str | None:
        """`model.reference`, in the rounds that have it as their reference."""
        model, train = self._config.model, self._config.train
        return model.reference if round_ == 0 or train.reference == "initial" else None

    def maker(self, role: str, round_: int) -> Step | None:
        """The step whose model plays the role; None: a model from outside the run."""
        if role == "trained":
            return Step(BY_NAME["train"], round_)
        outside = role in ("start", "base", "token_reward", "baseline", "second_judge")
        if outside or self._names(round_).get(role):
            return None
        moves = role in ("policy", "judge") or (role == "reference" and self._config.train.reference == "start")
        if moves and round_ > 0:
            return Step(BY_NAME["train"], round_ - 1)
        return Step(BY_NAME["sft"], 0) if self._config.sft.on else None
