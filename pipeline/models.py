"""Which model plays which role in which round."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from pipeline.fingerprint import content_of
from pipeline.plan import Planner
from pipeline.rundir import RunDir
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.manifests import FileRecord, StageManifest
from stages.catalog import BY_NAME
from stages.contract import ModelRef
from stages.schedule import Step

TRAINED = "model"
ADAPTER = "adapter"
_PACKAGES = ("safetensors", "transformers")
_ROLES = frozenset(
    {"start", "initial", "policy", "reference", "judge", "evaluation_judge", "trained", "sft", "base", "token_reward"}
)


class Models:
    """Resolves models once; a trained model is known by the hashes of its files."""

    def __init__(self, config: RunConfig, rundir: RunDir) -> None:
        self._config, self._rundir = config, rundir
        self._resolved: dict[tuple[str, str | None], ModelRef] = {}

    def start(self) -> ModelRef:
        """`model.policy`, before the run trained anything."""
        return self._resolve(self._config.model.policy, self._config.model.revision)

    def of(self, step: Step) -> dict[str, ModelRef]:
        """role -> model for a step; only the roles its result depends on."""
        return {role: self._role(role, step.round) for role in step.spec.models if self._known(role, step.round)}

    def outside(self, steps: Iterable[Step]) -> dict[ModelRef, bool]:
        """Models from outside the run that steps read -> whether their gradients are sketched. What the run itself makes has
        the architecture of what it starts from."""
        found: dict[ModelRef, bool] = {}
        for step in steps:
            roles = [role for role in step.spec.models if self._takes_part(role)]
            for role in roles:
                model = self._role(role, step.round) if self._maker(role, step.round) is None else self.start()
                found[model] = found.get(model, False) or (step.spec.sketches and role == "policy")
        return found

    def digests(self, step: Step) -> dict[str, str]:
        """role -> content hash."""
        return {role: model.digest for role, model in self.of(step).items()}

    def missing(self, step: Step) -> list[str]:
        """Titles of the unfinished steps whose models the step needs."""
        roles = [role for role in step.spec.models if self._takes_part(role) and not self._known(role, step.round)]
        return list(dict.fromkeys(maker.title for role in roles if (maker := self._maker(role, step.round))))

    def files(self, step: Step) -> list[FileRecord]:
        """Files of the trained models among the step's models."""
        makers = {self._maker(role, step.round) for role in step.spec.models if self._takes_part(role)} - {None}
        found = [self._rundir.stage(maker.spec, maker.round) for maker in sorted(filter(None, makers), key=_order)]
        return [file for manifest in found if manifest is not None for file in model_files(manifest)]

    def _known(self, role: str, round_: int) -> bool:
        """A model that the run makes is not there before the stage that makes it has finished."""
        if not self._takes_part(role):
            return False
        maker = self._maker(role, round_)
        return maker is None or self._rundir.stage(maker.spec, maker.round) is not None

    def _takes_part(self, role: str) -> bool:
        """sft and base only when merging, token_reward only when ALLO has a reward model."""
        train, sft = self._config.train, self._config.sft
        if role == "token_reward":
            return train.allo.reward_model is not None
        if role not in ("sft", "base"):
            return True
        facts = train.merge_facts
        if facts is None:
            return False
        own_base = sft.on and not facts.anchored  # the model the run starts from
        return role == "sft" or train.merge.base is not None or own_base

    def _maker(self, role: str, round_: int) -> Step | None:
        """The step whose model plays the role; None: a model from outside the run."""
        model, train = self._config.model, self._config.train
        if role == "trained":
            return Step(BY_NAME["train"], round_)
        own = {"judge": model.judge, "evaluation_judge": model.evaluation_judge, "sft": train.merge.sft}
        if role in ("start", "base", "token_reward") or own.get(role):
            return None
        moves = role in ("policy", "judge") or (role == "reference" and train.reference == "start")
        if moves and round_ > 0:
            return Step(BY_NAME["train"], round_ - 1)
        return Step(BY_NAME["sft"], 0) if self._config.sft.on else None

    def _role(self, role: str, round_: int) -> ModelRef:
        if role not in _ROLES:
            raise ValueError(f"no such role: {role}")
        maker = self._maker(role, round_)
        if maker is not None:
            return self._made(maker)
        model, train = self._config.model, self._config.train
        own = {"judge": model.judge, "evaluation_judge": model.evaluation_judge, "sft": train.merge.sft}
        name = (own | {"base": train.merge.base, "token_reward": train.allo.reward_model}).get(role)
        return self._resolve(name, None) if name else self.start()

    def _made(self, maker: Step) -> ModelRef:
        spec, round_ = maker.spec, maker.round
        manifest = self._rundir.stage(spec, round_)
        if manifest is None:
            raise UserError(f"Stage {maker.title} has not run", fix="Run it first.")
        artifacts = self._rundir.artifacts(spec, round_)
        base = self._role(spec.trains, round_).path
        adapter = artifacts / ADAPTER
        merged = None if base is None or not adapter.is_dir() else (adapter, base)
        name = f"{self._config.name} " + (f"round {round_}" if spec.per_round else spec.name)
        return ModelRef(name, artifacts / TRAINED, content_of(model_files(manifest)), merged, hub=self.start().hub)

    def _resolve(self, name: str, revision: str | None) -> ModelRef:
        if (name, revision) not in self._resolved:
            if missing := [package for package in _PACKAGES if find_spec(package) is None]:
                raise UserError(
                    f"Models need the packages {', '.join(missing)}, which the core does not have",
                    where=name,
                    fix='Install an extra: pip install "congrad-pipeline[cpu]" or "congrad-pipeline[cuda]" (in a clone: -e ".[cpu]").',
                )
            from stages.models.resolve import resolve

            self._resolved[name, revision] = resolve(name, revision)
        return self._resolved[name, revision]


def model_files(manifest: StageManifest) -> list[FileRecord]:
    """The model's files among the artifacts of an sft or train stage."""
    folder = f"/{manifest.stage}/{TRAINED}/"
    return [f for f in manifest.files if folder in f"/{f.path}" and not f.path.endswith(".md")]


def _order(step: Step) -> tuple[int, str]:
    return step.round, step.spec.name


def recorded_digests(planner: Planner, step: Step) -> dict[str, str]:
    """Digests as they were when the step last ran, for `status`, which looks at no model."""
    plan = planner.rundir.plan(step.spec, step.round)
    values = plan.ingredients if plan else {}
    return {name.removeprefix("model "): value for name, value in values.items() if name.startswith("model ")}
