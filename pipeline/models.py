"""Which model plays which role in which round."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from pipeline.fingerprint import content_of
from pipeline.makers import Makers
from pipeline.rundir import RunDir
from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.manifests import FileRecord, StageManifest
from stages.catalog import STAGES
from stages.contract import ModelRef
from stages.schedule import Step

TRAINED = "model"
ADAPTER = "adapter"
_PACKAGES = ("safetensors", "transformers")
_ROLES = frozenset(role for spec in STAGES for role in spec.models)


class Models:
    """Resolves models once; a trained model is known by the hashes of its files."""

    def __init__(self, config: RunConfig, rundir: RunDir) -> None:
        self._config, self._rundir, self._makers = config, rundir, Makers(config)
        self._resolved: dict[tuple[str, str | None], ModelRef] = {}

    def start(self) -> ModelRef:
        """`model.policy`, before the run trained anything."""
        return self._resolve(self._config.model.policy, self._config.model.revision)

    def reference(self) -> ModelRef:
        """That of the first round."""
        return self._role("reference", 0)

    def of(self, step: Step) -> dict[str, ModelRef]:
        """role -> model for a step; only the roles its result depends on."""
        return {
            role: self._role(role, step.round)
            for role in step.spec.roles(self._config)
            if self._known(role, step.round)
        }

    def outside(self, steps: Iterable[Step]) -> dict[ModelRef, bool]:
        """Models from outside the run that steps read -> whether their gradients are sketched. What the run itself makes has
        the architecture of what it starts from."""
        found: dict[ModelRef, bool] = {}
        for step in steps:
            for role in step.spec.roles(self._config):
                if role in self._classifiers or not self._makers.takes_part(role):
                    continue
                model = self._role(role, step.round) if self._makers.maker(role, step.round) is None else self.start()
                found[model] = found.get(model, False) or (step.spec.sketches and role == "policy")
        return found

    def rendered(self, steps: Iterable[Step]) -> list[ModelRef]:
        """Models from outside the run whose chat templates steps use, reward models included; once each."""
        roles = ((role, step.round) for step in steps for role in step.spec.roles(self._config))
        found = (
            self._role(role, round_) if self._makers.maker(role, round_) is None else self.start()
            for role, round_ in roles
            if self._makers.takes_part(role)
        )
        return list(dict.fromkeys(found))

    @property
    def _classifiers(self) -> frozenset[str]:
        """Roles of models that may be classifiers: another architecture of the same files."""
        judges = self._config.judge.judges
        return frozenset({"token_reward"} | {judge.role for judge in judges if judge.settings.facts.task == "reward"})

    def digest(self, role: str, round_: int) -> str:
        """Content hash of one role's model."""
        return self._role(role, round_).digest

    def digests(self, step: Step) -> dict[str, str]:
        """role -> content hash."""
        return {role: model.digest for role, model in self.of(step).items()}

    def missing(self, step: Step) -> list[str]:
        """Titles of the unfinished steps whose models the step needs."""
        roles = [role for role in step.spec.roles(self._config) if not self._known(role, step.round)]
        makers = (self._makers.maker(role, step.round) for role in roles if self._makers.takes_part(role))
        return list(dict.fromkeys(maker.title for maker in makers if maker))

    def files(self, step: Step) -> list[FileRecord]:
        """Files of the trained models among the step's models."""
        found = [self._rundir.stage(maker.spec, maker.round) for maker in self._makers.of(step)]
        return [file for manifest in found if manifest is not None for file in model_files(manifest)]

    def _known(self, role: str, round_: int) -> bool:
        """A model that the run makes is not there before the stage that makes it has finished."""
        if not self._makers.takes_part(role):
            return False
        maker = self._makers.maker(role, round_)
        return maker is None or self._rundir.result(maker.spec, maker.round) is not None

    def _role(self, role: str, round_: int) -> ModelRef:
        judges = self._config.judge.models
        if role not in _ROLES | judges.keys():
            raise ValueError(f"no such role: {role}")
        maker = self._makers.maker(role, round_)
        if maker is not None:
            return self._made(maker)
        return self._resolve(*self._makers.given(role, round_))

    def _made(self, maker: Step) -> ModelRef:
        spec, round_ = maker.spec, maker.round
        manifest = self._rundir.result(spec, round_)
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
                    fix='Install an extra: pip install -e ".[cpu]" or ".[cuda]".',
                )
            from stages.models.resolve import resolve

            self._resolved[name, revision] = resolve(name, revision)
        return self._resolved[name, revision]


def model_files(manifest: StageManifest) -> list[FileRecord]:
    """The model's files among the artifacts of an sft or train stage."""
    folder = f"/{manifest.stage}/{TRAINED}/"
    return [f for f in manifest.files if folder in f"/{f.path}" and not f.path.endswith(".md")]
