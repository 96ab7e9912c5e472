"""Config of the judges: one, several of the same thing (a panel), or some for each criterion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from schemas.config.base import FilePath, Section, execution, other_than, semantic
from schemas.config.model import EngineConfig, Sampling
from schemas.judging import METHODS, JudgeMethod, MethodFacts

GENERATED: dict[str, Any] = {"pairs.sources": []}
"""Imported pairs are neither generated nor judged."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")]
_RUBRIC = tuple(method for method, facts in METHODS.items() if facts.rubric)


def _only(*methods: JudgeMethod) -> dict[str, Any]:
    return {".method": methods} | GENERATED


class JudgeSettings(Section):
    """How one judge scores an answer (docs/judges.md)."""

    method: JudgeMethod = semantic(
        "expected_score", "how an answer is scored (docs/judges.md has each method's scale)", used_when=GENERATED
    )
    engine: EngineConfig | None = semantic(
        None,
        "an engine of the judge's own, for example a server, with the keys of `engine`; default: the run's",
        used_when=GENERATED,
    )
    votes: int = semantic(1, "additive: reasoned votes per answer", used_when=_only("additive"), ge=1, le=4096)
    min_mass: float = semantic(
        0.5,
        "least probability on the possible replies (the scores, or A and B); less is no judgement",
        used_when=_only("expected_score", "pairwise"),
        ge=0,
        le=1,
    )
    rubric: FilePath = semantic(
        "package:rubrics/{language}.yaml",
        "rubric files, the evaluation judge's too; a missing language falls back to en, which is printed",
        used_when=(_only(*_RUBRIC), {"evaluate.win_rate": True}),
    )
    thoughts: bool = semantic(False, "show the judge the thought before an answer too", used_when=GENERATED)
    sampling: Sampling = semantic(
        Sampling(temperature=0.7, max_tokens=256),
        "additive: sampling of the reasoning; its system_prompt goes to expected_score too",
        used_when=_only("expected_score", "additive"),
    )
    chat_template: FilePath | None = semantic(
        None,
        "a Jinja template file for the judge; default: reward_model: its tokenizer's own; else as text.chat_template",
        used_when=GENERATED,
    )
    max_length: int | None = semantic(
        None,
        "most tokens that reward_model or implicit_reward reads of a prompt with its answer; default: text.max_length",
        used_when=_only("reward_model", "implicit_reward"),
        ge=16,
        le=1 << 24,
    )
    head: int | str | None = semantic(
        None,
        "reward_model: which of several heads is the score, by number or label",
        used_when=_only("reward_model"),
    )
    reference: FilePath | None = execution(
        None, "implicit_reward: the model that the judge was trained from by DPO", used_when=_only("implicit_reward")
    )
    beta: float = semantic(
        0.1, "implicit_reward: the reward is beta (log pi - log pi_ref)", used_when=_only("implicit_reward"), gt=0
    )
    cross_lingual: bool = semantic(
        False,
        "implicit_reward: read the answer after the English prompt of its translation group (arXiv 2503.04647)",
        used_when=_only("implicit_reward"),
    )
    opponents: int = semantic(
        0,
        "pairwise: answers that each is compared with on either side, in a circle; 0: all",
        used_when=_only("pairwise"),
        ge=0,
        le=4096,
    )

    @model_validator(mode="after")
    def _samples(self) -> JudgeSettings:
        standard = type(self).model_fields["sampling"].default
        if self.method == "expected_score" and self.sampling.model_copy(update={"system_prompt": None}) != standard:
            raise ValueError(
                "judge.sampling: method expected_score reads probabilities and samples nothing; of sampling it takes system_prompt alone"
            )
        return self

    @property
    def facts(self) -> MethodFacts:
        """What is true of the method."""
        return METHODS[self.method]


class PanelJudge(JudgeSettings):
    """One of several judges. What it leaves out is taken from the section around it, unless it names a method of its own."""

    model: FilePath | None = execution(None, "the judge's model; default: model.judge", used_when=GENERATED)


class Criterion(PanelJudge):
    """A criterion: its judge, or a panel of judges."""

    panel: dict[Name, PanelJudge] = semantic(
        {},
        "several judges of the same answers: name -> a `model` and what differs of these keys (docs/judges.md)",
        used_when=GENERATED,
    )
    combine: Literal["mean", "agree"] = semantic(
        "mean",
        "panel: mean of their standardised scores; agree: and every one of them prefers chosen",
        used_when={".panel": other_than({})} | GENERATED,
    )

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        return _handed_down(data, "panel", PanelJudge)


class JudgeConfig(JudgeSettings):
    """Judge stage (docs/judges.md)."""

    panel: dict[Name, PanelJudge] = semantic(
        {},
        "several judges of the same answers: name -> a `model` and what differs of these keys (docs/judges.md)",
        used_when=GENERATED,
    )
    combine: Literal["mean", "agree"] = semantic(
        "mean",
        "panel: mean of their standardised scores; agree: and every one of them prefers chosen",
        used_when={".panel": other_than({})} | GENERATED,
    )
    criteria: dict[Name, Criterion] = semantic(
        {},
        "answers are judged, and pairs made, by each: name -> `model`, `panel` and what differs of these keys (docs/judges.md)",
        used_when=GENERATED,
    )
    shard_size: int = semantic(1024, "candidates per shard", used_when=GENERATED, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        return _handed_down(_handed_down(data, "panel", PanelJudge), "criteria", Criterion)

    @model_validator(mode="after")
    def _possible(self) -> JudgeConfig:
        if self.criteria and self.panel:
            raise ValueError("judge.panel and judge.criteria: give each criterion its own panel (criteria.NAME.panel)")
        for judge in self.judges:
            if judge.settings.facts.reference and judge.settings.reference is None:
                raise ValueError(
                    f"{judge.where}.method: {judge.settings.method} needs {judge.where}.reference, the model that the judge was"
                    " trained from by DPO"
                )
        return self

    @property
    def judges(self) -> list[Judge]:
        """Every judge of the run, in order."""
        sections = self.criteria.items() if self.criteria else [("", self)]
        return [
            Judge(criterion, name, settings)
            for criterion, section in sections
            for name, settings in (section.panel.items() if section.panel else [("", section)])
        ]

    @property
    def models(self) -> dict[str, str | None]:
        """Role -> model as the config names it (None: as `model.judge` says) of every model that a judge needs."""
        named: dict[str, str | None] = {}
        for judge in self.judges:
            named[judge.role] = judge.model
            if judge.settings.facts.reference:
                named[judge.reference_role] = judge.settings.reference
        return named

    def scale_of(self, criterion: str) -> tuple[str, tuple[float, float] | None]:
        """The scale of the scores by a criterion in words, and its bounds, if it has any."""
        if self.section_of(criterion).panel:
            return "standard deviations", None
        facts = self.section_of(criterion).facts
        return facts.scale, facts.bounds

    def section_of(self, criterion: str) -> JudgeConfig | Criterion:
        """Where `panel` and `combine` of a criterion stand."""
        return self.criteria[criterion] if criterion else self


@dataclass(frozen=True)
class Judge:
    """A judge of the run: the criterion it judges by ("" without criteria), its name in the panel ("" alone)."""

    criterion: str
    name: str
    settings: JudgeSettings

    @property
    def where(self) -> str:
        """Its section in the config."""
        of = f"judge.criteria.{self.criterion}" if self.criterion else "judge"
        return f"{of}.panel.{self.name}" if self.name else of

    @property
    def model(self) -> str | None:
        """Its model, if it has one of its own."""
        return self.settings.model if isinstance(self.settings, PanelJudge) else None

    @property
    def key(self) -> str:
        """CRITERION/NAME; unique."""
        return f"{self.criterion}/{self.name}"

    @property
    def role(self) -> str:
        """The role of its model; judges without one of their own share `judge`."""
        return f"judge {self.key}" if self.model else "judge"

    @property
    def reference_role(self) -> str:
        """The role of its reference."""
        return f"judge_reference {self.key}"


def _filled(own: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry says, and of what it says in part (its sampling) the rest."""
    parts = {
        name: {**own[name], **value}
        for name, value in entry.items()
        if name == "sampling" and isinstance(value, Mapping) and isinstance(own.get(name), Mapping)
    }
    return {**own, **entry, **parts}


def _handed_down(data: Any, key: str, kind: type[JudgeSettings]) -> Any:
    """The section with what it says handed down to the entries of `key` that name no method of their own."""
    entries = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(entries, Mapping):
        return data
    own = {
        name: value for name, value in data.items() if name in kind.model_fields and name not in ("panel", "combine")
    }
    return {
        **data,
        key: {
            name: _filled(own, entry or {})
            if entry is None or (isinstance(entry, Mapping) and "method" not in entry)
            else entry
            for name, entry in entries.items()
        },
    }
