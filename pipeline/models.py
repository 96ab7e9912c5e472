"""Which model plays which role in which round."""

from __future__ import annotations

from pipeline.fingerprint import content_of
from pipeline.plan import Planner, Step
from pipeline.rundir import RunDir
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.manifests import FileRecord, StageManifest
from stages.catalog import BY_NAME
from stages.contract import ModelRef

TRAINED = "model"
ADAPTER = "adapter"


class Models:
    """Resolves models once; a trained model is known by the hashes of its files."""

    def __init__(self, config: RunConfig, rundir: RunDir) -> None:
        self._config, self._rundir = config, rundir
        self._resolved: dict[tuple[str, str | None], ModelRef] = {}

    def initial(self) -> ModelRef:
        """The policy before any training."""
        return self._resolve(self._config.model.policy, self._config.model.revision)

    def of(self, step: Step) -> dict[str, ModelRef]:
        """role -> model for a step; only the roles its result depends on."""
        return {role: self._role(role, step.round) for role in step.spec.models if self._known(role, step.round)}

    def digests(self, step: Step) -> dict[str, str]:
        """role -> content hash."""
        return {role: model.digest for role, model in self.of(step).items()}

    def files(self, step: Step) -> list[FileRecord]:
        """Files of the trained models among the step's models."""
        rounds = {self._trained_in(role, step.round) for role in step.spec.models} - {None}
        found = [self._rundir.stage(BY_NAME["train"], k) for k in sorted(r for r in rounds if r is not None)]
        return [file for manifest in found if manifest is not None for file in model_files(manifest)]

    def _known(self, role: str, round_: int) -> bool:
        """A round's start model is not there before the round before it was trained; sft and base only when
        merging, token_reward only when ALLO has a reward model."""
        if role == "token_reward":
            return self._config.train.allo.reward_model is not None
        if role in ("sft", "base"):
            train = self._config.train
            return train.optimizer != "adamw" and (role == "sft" or train.merge.base is not None)
        needs = self._trained_in(role, round_)
        return needs is None or self._rundir.stage(BY_NAME["train"], needs) is not None

    def _trained_in(self, role: str, round_: int) -> int | None:
        """The round whose trained model plays the role; None: a model from outside the run."""
        if role == "trained":
            return round_
        outside = {"judge": self._config.model.judge, "reference": self._config.train.reference == "initial"}
        inside = role == "policy" or (role in outside and not outside[role])
        return round_ - 1 if inside and round_ > 0 else None

    def _role(self, role: str, round_: int) -> ModelRef:
        model = self._config.model
        match role:
            case "initial":
                return self.initial()
            case "policy":
                return self.initial() if round_ == 0 else self._trained(round_ - 1)
            case "reference":
                return self.initial() if self._config.train.reference == "initial" else self._role("policy", round_)
            case "judge":
                return self._resolve(model.judge, None) if model.judge else self._role("policy", round_)
            case "evaluation_judge":
                return self._resolve(model.evaluation_judge, None) if model.evaluation_judge else self.initial()
            case "trained":
                return self._trained(round_)
            case "sft":
                sft = self._config.train.merge.sft
                return self._resolve(sft, None) if sft else self.initial()
            case "base" if self._config.train.merge.base:
                return self._resolve(self._config.train.merge.base, None)
            case "token_reward" if self._config.train.allo.reward_model:
                return self._resolve(self._config.train.allo.reward_model, None)
        raise ValueError(f"no such role: {role}")

    def _trained(self, round_: int) -> ModelRef:
        train = BY_NAME["train"]
        manifest = self._rundir.stage(train, round_)
        if manifest is None:
            raise UserError(f"Round {round_} has not been trained", fix="Run its train stage first.")
        artifacts = self._rundir.artifacts(train, round_)
        base, adapter = self._role("policy", round_).path, artifacts / ADAPTER
        merged = None if base is None or not adapter.is_dir() else (adapter, base)
        name = f"{self._config.name} round {round_}"
        return ModelRef(name, artifacts / TRAINED, content_of(model_files(manifest)), merged)

    def _resolve(self, name: str, revision: str | None) -> ModelRef:
        if (name, revision) not in self._resolved:
            from stages.models.resolve import resolve

            self._resolved[name, revision] = resolve(name, revision)
        return self._resolved[name, revision]


def model_files(manifest: StageManifest) -> list[FileRecord]:
    """The trained model's files among a train stage's artifacts."""
    return [f for f in manifest.files if f"/train/{TRAINED}/" in f"/{f.path}" and not f.path.endswith(".md")]


def recorded_digests(planner: Planner, step: Step) -> dict[str, str]:
    """Digests as they were when the step last ran, for `status`, which looks at no model."""
    plan = planner.rundir.plan(step.spec, step.round)
    values = plan.ingredients if plan else {}
    return {name.removeprefix("model "): value for name, value in values.items() if name.startswith("model ")}
