"""The whole config of a run: one YAML file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, field_validator, model_validator

from schemas.config.base import Section, execution, other_than, semantic
from schemas.config.card import CardConfig
from schemas.config.curation import (
    BY_IMPLICIT_REWARDS,
    ConflictConfig,
    GenerateConfig,
    GradientsConfig,
    PairsConfig,
    SelectConfig,
)
from schemas.config.evaluation import EvaluateConfig
from schemas.config.judging import Judge, JudgeConfig
from schemas.config.loss import LossConfig
from schemas.config.model import EngineConfig, ModelConfig, TextConfig
from schemas.config.sft import SftConfig
from schemas.config.sources import LanguageConfig, PairSource, PromptsConfig, PromptSource
from schemas.config.training import ExecutionConfig, ReportConfig, TrainConfig
from schemas.config.used import Useless, unused
from schemas.engines import ENGINES, MOST_OF_A_GPU
from schemas.paths import expanded
from schemas.secrets import holds_credentials

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""What a run may be called."""


class RunConfig(Section):
    """Everything a run needs. `congrad init` writes a commented one."""

    name: str = execution(description="name of the run: its folder under run_dir", pattern=NAME)
    run_dir: Path = execution(
        Path("runs"), "folder that holds runs; may lie behind a link, no folder in a run may be one"
    )
    banner: str | None = execution(None, "shown when the run starts and ends, and in the report")
    seed: int = semantic(
        0,
        "seed of everything but the projections (gradients.sketch.seed); train.seed and select.seed override it",
        ge=0,
        lt=1 << 63,
    )
    rounds: int = execution(1, "self-rewarding rounds", ge=1, le=1000)
    languages: LanguageConfig = semantic(description="languages of the run")
    model: ModelConfig = semantic(description="models")
    text: TextConfig = semantic(TextConfig(), "text to tokens")
    engine: EngineConfig = semantic(EngineConfig(), "inference engine")
    prompts: PromptsConfig = semantic(PromptsConfig(), "prompts stage", used_when={"prompts.sources": other_than([])})
    sft: SftConfig = semantic(SftConfig(), "sft stage", used_when={"sft.sources": other_than([])})
    generate: GenerateConfig = semantic(GenerateConfig(), "generate stage")
    judge: JudgeConfig = semantic(JudgeConfig(), "judge stage")
    pairs: PairsConfig = semantic(PairsConfig(), "pairs stage")
    loss: LossConfig = semantic(LossConfig(), "preference loss")
    gradients: GradientsConfig = semantic(GradientsConfig(), "gradients stage")
    conflict: ConflictConfig = semantic(ConflictConfig(), "conflict stage")
    select: SelectConfig = semantic(SelectConfig(), "select stage")
    train: TrainConfig = semantic(TrainConfig(), "train stage")
    evaluate: EvaluateConfig = semantic(EvaluateConfig(), "evaluate stage")
    card: CardConfig = execution(CardConfig(), "model and dataset cards")
    report: ReportConfig = semantic(ReportConfig(), "the report")
    execution: ExecutionConfig = semantic(ExecutionConfig(), "how the run is carried out")

    @field_validator("run_dir", mode="before")
    @classmethod
    def _place(cls, value: Any) -> Any:
        if not isinstance(value, (str, Path)):
            return value
        if holds_credentials(str(value)):
            raise ValueError("it is a folder, and no address with a user name or password")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(value)):
            raise ValueError(
                "it is a folder: an object store renames no files, so that nothing could be committed there; `congrad export --out"
                " s3://...` sends results"
            )
        return expanded(str(value))

    @property
    def imported(self) -> bool:
        """Whether pairs are imported, so that generation and judging are skipped."""
        return bool(self.pairs.sources)

    @property
    def prompted(self) -> bool:
        """Whether prompts are read: to generate from, or to evaluate imported pairs on."""
        return bool(self.prompts.sources)

    @property
    def training_seed(self) -> int:
        """Seed of training alone."""
        return self.seed if self.train.seed is None else self.train.seed

    @property
    def selection_seed(self) -> int:
        """Seed of a random selection."""
        return self.seed if self.select.seed is None else self.select.seed

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.run_dir / self.name

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        for place, text in _texts(self, ""):
            if holds_credentials(text):
                raise ValueError(
                    f"{place} holds a user name, password or key, which would be copied to run.yaml and the report: take it out,"
                    " or write $VARIABLE in its place in engine.base_url, and set engine.api_key_env for a key"
                )
        if not self.prompts.sources and not self.imported:
            raise ValueError("nothing to start from: give prompts.sources, or pairs.sources to curate existing pairs")
        if self.imported and self.rounds > 1:
            raise ValueError("rounds > 1 generates new pairs; it cannot be combined with pairs.sources")
        if self.execution.deterministic and (not self.engine.facts.deterministic or self.model.dtype != "float32"):
            kinds = " or ".join(name for name, facts in ENGINES.items() if facts.deterministic)
            raise ValueError(
                f"execution.deterministic (reference mode) needs engine.kind: {kinds} and model.dtype: float32"
            )
        if self.execution.deterministic and self.execution.device == "cuda":
            raise ValueError("execution.deterministic (reference mode) computes on the CPU: leave execution.device out")
        leaves_adapter = self.train.method == "lora" and not self.train.orthalign.objectives
        if self.rounds > 1 and self.gradients.of == "adapter" and not leaves_adapter:
            raise ValueError(
                "gradients.of: adapter needs the adapter that the round before trained, and train.method: full and"
                " train.orthalign leave none: set gradients.of: weights, or rounds: 1"
            )
        if self.train.allo.on and self.loss.type != "sigmoid":
            raise ValueError(f"train.allo learns by DPO on key tokens, and loss.type is {self.loss.type}: use sigmoid")
        if self.train.allo.on and self.loss.alpha:
            raise ValueError(
                "loss.alpha counts the tokens of whole answers, and train.allo trains on some: set it to 0, or leave out"
                " train.allo"
            )
        if self.train.allo.on and self.loss.nll:
            raise ValueError(
                "loss.nll is of whole chosen answers, and train.allo trains on some tokens of the rejected ones: set it to 0, or leave"
                " out train.allo"
            )
        self._conflict()
        for key in unused(self):
            raise Useless(key)
        first = self.model.evaluation_judge
        if (
            first is not None
            and first == self.evaluate.second_judge.model
            and self.evaluate.second_judge.engine is None
        ):
            raise ValueError(
                f"evaluate.second_judge.model is the first judge ({first}, model.evaluation_judge): it would agree with itself"
            )
        if self.train.language_surgery != "none" and len(self.languages.seen) < 2:
            raise ValueError(
                f"train.language_surgery resolves conflicts between languages, and languages.seen has one"
                f" ({self.languages.seen[0]}): leave it out"
            )
        self._judges()
        self._objectives()
        self.check_dev(lambda source: source.may_name_split)
        self._sides()
        self._references()
        self._models()
        if self.gradients.sketch.method == "one_sided":
            self._one_sided()
        return self

    def _conflict(self) -> None:
        """What the conflict section says of languages and splits that the run has."""
        conflict = self.conflict
        if unknown := sorted(set(conflict.language_weights) - set(self.languages.seen)):
            raise ValueError(
                f"conflict.language_weights names {', '.join(unknown)}, not in languages.seen: {', '.join(self.languages.seen)}"
            )
        if not any(conflict.language_weights.get(code, 1.0) for code in self.languages.seen):
            raise ValueError("conflict.language_weights gives every language 0: nothing is left to compare with")
        if conflict.target != "train" and self.gradients.sketch.method == "one_sided":
            raise ValueError(
                f"conflict.target: {conflict.target} needs gradients.sketch.method: two_sided: one_sided sums the pairs that are scored"
            )
        if conflict.target != "train" and self.rounds > 1:
            raise ValueError(
                f"conflict.target: {conflict.target} needs rounds: 1: held-out pairs are made in round 0, with its model"
            )

    def _objectives(self) -> None:
        """Objectives named after a criterion are the criteria of the judge."""
        criteria = self.judge.criteria
        for objective in self.train.orthalign.objectives:
            if objective.criterion is not None and objective.criterion not in criteria:
                known = ", ".join(criteria) or "none"
                raise ValueError(
                    f"train.orthalign.objectives: {objective.name} is no criterion of judge.criteria ({known}): name one of"
                    " them, or write the objective as {name: …, where: …}"
                )

    def check_dev(self, names_split: Callable[[PromptSource | PairSource], bool]) -> None:
        """Raise ValueError where pairs of the dev split are needed and there can be none, or would be others than were meant.

        names_split: whether rows of a source may be in a split that is not drawn by hash. The config knows what its keys say
        (`may_name_split`), the stages also what lies on the hub (`stages.sources.names_splits`).
        """
        key, held_out = ("pairs", self.pairs) if self.imported else ("prompts", self.prompts)
        target, fraction = self.conflict.target, held_out.dev_fraction
        unnamed = [source.path for source in held_out.sources if not names_split(source)]
        none = not fraction and len(unnamed) == len(held_out.sources)
        if target != "train" and none:
            raise ValueError(
                f"conflict.target: {target} needs trusted pairs, {key}.dev_fraction is 0, and no source says which of its rows are"
                f" trusted: set split: dev on a source in {key}.sources (a data set on the hub: splits: {{its split: dev}}), or raise"
                f" {key}.dev_fraction"
            )
        if target != "train" and fraction and 0 < len(unnamed) < len(held_out.sources):
            raise ValueError(
                f"conflict.target: {target}: {key}.dev_fraction {fraction:g} would put rows of {unnamed[0]} among the"
                f" trusted pairs, unchecked: set {key}.dev_fraction: 0, or split: train on that source (a data set on the hub: splits:"
                " {its split: train})"
            )
        if self.train.orthalign.rank == "search" and none:
            raise ValueError(
                f"train.orthalign.rank: search needs dev pairs, {key}.dev_fraction is 0, and no source says which of its rows are dev:"
                f" raise {key}.dev_fraction, name the split in {key}.sources (fields.split, split, splits), or use rank: energy"
            )

    def judge_engine(self, judge: Judge) -> EngineConfig:
        """The engine a judge runs on."""
        return judge.settings.engine or self.engine

    @property
    def judge_models(self) -> list[str | None]:
        """The models that judge, each once, as the config names them; None: the policy of the round."""
        return list(dict.fromkeys(judge.model or self.model.judge for judge in self.judge.judges))

    @property
    def judges_itself(self) -> bool:
        """Whether answers are judged by the policy that wrote them, and by nobody else."""
        return self.judge_models == [None]

    @property
    def own_engines(self) -> list[EngineConfig]:
        """The run's engine."""
        return [self.engine]

    @property
    def judge_engines(self) -> list[EngineConfig]:
        """The engines of all judges, each once."""
        engines: list[EngineConfig] = []
        for judge in self.judge.judges:
            if (engine := self.judge_engine(judge)) not in engines:
                engines.append(engine)
        return engines

    @property
    def evaluate_engines(self) -> list[EngineConfig]:
        """The engines of the evaluation, each once."""
        second = self.evaluate.second_judge.engine
        return [self.engine] if second is None or second == self.engine else [self.engine, second]

    @property
    def evaluate_gpus(self) -> int:
        """GPUs that a worker of the evaluate stage sees."""
        return max(engine.tensor_parallel for engine in self.evaluate_engines)

    @property
    def judge_gpus(self) -> int:
        """GPUs that a worker of the judge stage sees."""
        return max(self.judge_engine(judge).tensor_parallel for judge in self.judge.judges)

    def _judges(self) -> None:
        """Judges and the engines they run on."""
        shares: dict[str, float] = {}
        for judge in self.judge.judges if not self.imported else []:
            facts, engine = judge.settings.facts, self.judge_engine(judge)
            if facts.own_model and not (judge.model or self.model.judge):
                raise ValueError(
                    f"{judge.where}.method: {judge.settings.method} needs a judge of its own: set model.judge"
                )
            if facts.task not in engine.facts.loads:
                able = " or ".join(name for name, other in ENGINES.items() if facts.task in other.loads)
                raise ValueError(
                    f"{judge.where}.method: {judge.settings.method} cannot be run by engine.kind: {engine.kind}: give the judge an"
                    f" engine of its own, {judge.where}.engine with kind {able}"
                )
            if self.execution.deterministic and not engine.facts.deterministic:
                raise ValueError(
                    f"execution.deterministic (reference mode) and {judge.where}.engine.kind: {engine.kind} contradict each other"
                )
            if judge.settings.cross_lingual and not any(code.split("-")[0] == "en" for code in self.languages.codes):
                raise ValueError(
                    f"{judge.where}.cross_lingual reads answers after the English prompt of their translation group, and en is"
                    " none of the run's languages"
                )
            if engine.facts.reserves:
                name = judge.model or self.model.judge or ""
                shares[f"{facts.task} {name} {engine!r}"] = engine.gpu_memory_utilization
                if facts.reference:
                    shares[f"{facts.task} {judge.settings.reference} {engine!r}"] = engine.gpu_memory_utilization
        if len(shares) > 1 and round(sum(shares.values()), 6) > MOST_OF_A_GPU:
            raise ValueError(
                f"the judges need {len(shares)} engines at once, and their gpu_memory_utilization adds up to"
                f" {sum(shares.values()):g}: give them engines of their own (judge.engine, judge.criteria.NAME.engine) whose shares"
                f" add up to at most {MOST_OF_A_GPU}, or engine.kind: transformers"
            )

    def _models(self) -> None:
        """Models that the run makes itself, or cannot do without."""
        facts = self.train.merge_facts
        if facts is not None and not facts.anchored and self.train.merge.base is None and not self.sft.on:
            raise ValueError(
                f"train.optimizer: {self.train.optimizer} needs train.merge.base, the pretrained model before SFT (a run with"
                " sft.sources has its own)"
            )
        if self.sft.on and not self.engine.facts.has_weights and not self.imported:
            kinds = " or ".join(name for name, facts in ENGINES.items() if facts.has_weights)
            raise ValueError(
                f"sft trains the policy here, and engine.kind: {self.engine.kind} generates with whatever the server has: use"
                f" {kinds}, or run sft by itself first and serve its model"
            )

    def _sides(self) -> None:
        """A loss that weighs the two answers of a pair apart needs the gradient of each."""
        at_reference = self.model.reference is None and (self.train.reference == "start" or self.rounds == 1)
        apart = self.conflict.weighting == "loss" and self.loss.weights_sides_apart(at_reference)
        if apart and not self.gradients.sketch.both_sides:
            raise ValueError(
                f"loss.type: {self.loss.type}{' with loss.nll' if self.loss.nll else ''} weighs the gradients of chosen and rejected apart, and only their difference is"
                " stored: set gradients.sketch.both_sides: true (with method two_sided or exact), or conflict.weighting: none to curate"
                " by the difference"
            )

    def _references(self) -> None:
        """`model.reference` has a use in every training; what is ranked by implicit rewards has some in every round."""
        given, train = self.model.reference is not None, self.train
        if given and train.allo.on:
            raise ValueError(
                "model.reference and train.allo contradict each other: its references are the models its phases start from"
            )
        if given and train.way == "sequence" and train.orthalign.reference == "objective":
            raise ValueError(
                "model.reference and train.orthalign.reference: objective contradict each other: set"
                " train.orthalign.reference: round, or leave model.reference out"
            )
        if self.select.by not in BY_IMPLICIT_REWARDS:
            return
        where = f"select.by: {self.select.by} goes by implicit rewards, which are zero where the policy is its own reference"
        if not given:
            raise ValueError(
                f"{where}: name the model that it was trained from (model.reference), or set select.by: logp_margin"
            )
        if self.rounds > 1 and train.reference == "start":
            raise ValueError(f"{where}, as after the first round: set train.reference: initial")

    def _one_sided(self) -> None:
        """One-sided sketches are never stored: what needs more than inner products with the directions is refused, and
        defaults of `conflict` that do are others here."""
        possible = {"leave_out": "pair", "metric": "unit"}
        missing = {name: value for name, value in possible.items() if name not in self.conflict.model_fields_set}
        self.conflict = self.conflict.model_copy(update=missing)
        if self.gradients.sketch.both_sides:
            raise ValueError(
                "gradients.sketch.both_sides stores two sketches per pair: set gradients.sketch.method: two_sided"
            )
        if self.conflict.leave_out != "pair":
            raise ValueError(
                f"conflict.leave_out: {self.conflict.leave_out} needs inner products between pairs, which"
                " gradients.sketch.method: one_sided does not have: leave it out or set conflict.leave_out: pair, or take"
                " method: two_sided"
            )
        if self.select.diversity.cells:
            raise ValueError(
                "select.diversity.cells compares pairs by their sketches, which gradients.sketch.method: one_sided does not "
                "store: set it to 0, or method: two_sided"
            )
        if self.conflict.metric in ("coordinate", "layer"):
            raise ValueError(
                f"conflict.metric: {self.conflict.metric} is fitted on stored sketches, which gradients.sketch.method: "
                "one_sided does not have: set conflict.metric: unit or raw, or method: two_sided"
            )


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every text of a config with its key."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _texts(getattr(value, name), f"{place}.{name}" if place else name)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(str(name), place)
            yield from _texts(item, f"{place}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{place}.{index}")
