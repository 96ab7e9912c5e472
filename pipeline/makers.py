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
        train, sft, evaluate = self._config.train, self._config.sft, self._config.evaluate
        given = {"baseline": evaluate.baseline.model, "second_judge": evaluate.second_judge.model}
        if role in given:
            return given[role] is not None
        if role == "token_reward":
            return train.allo.reward_model is not None
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
        model, train, evaluate = self._config.model, self._config.train, self._config.evaluate
        own = self._config.judge.models | {
            "judge": model.judge,
            "evaluation_judge": model.evaluation_judge,
            "reference": self.given_reference(round_),
            "sft": train.merge.sft,
            "base": train.merge.base,
            "token_reward": train.allo.reward_model,
            "baseline": evaluate.baseline.model,
            "second_judge": evaluate.second_judge.model,
        }
        name = own.get(role)
        return (name, None) if name else (model.policy, model.revision)

    def given_reference(self, round_: int) -> str | None:
        """`model.reference`, in the rounds that have it as their reference."""
        model, train = self._config.model, self._config.train
        return model.reference if round_ == 0 or train.reference == "initial" else None

    def maker(self, role: str, round_: int) -> Step | None:
        """The step whose model plays the role; None: a model from outside the run."""
        model, train = self._config.model, self._config.train
        if role == "trained":
            return Step(BY_NAME["train"], round_)
        own = self._config.judge.models | {
            "reference": self.given_reference(round_),
            "judge": model.judge,
            "evaluation_judge": model.evaluation_judge,
            "sft": train.merge.sft,
        }
        if role in ("start", "base", "token_reward", "baseline", "second_judge") or own.get(role):
            return None
        moves = role in ("policy", "judge") or (role == "reference" and train.reference == "start")
        if moves and round_ > 0:
            return Step(BY_NAME["train"], round_ - 1)
        return Step(BY_NAME["sft"], 0) if self._config.sft.on else None
