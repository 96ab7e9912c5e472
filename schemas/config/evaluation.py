"""Config of the evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from schemas.config.base import FilePath, Section, execution, other_than, semantic
from schemas.config.model import EngineConfig, Sampling
from schemas.config.sources import AuthoredSource, Source

_ANSWERED = {".prompts_per_language": other_than(0)}
_COMPARED = {".win_rate": True, ".prompts_per_language": other_than(0)}


class PromptSetFields(Section):
    """Names of the columns in a prompt set; the defaults are AlpacaEval's."""

    prompt: str = semantic("instruction", "text, or a list of messages ending in a user turn")
    system: str | None = semantic(None, "system message")
    language: str | None = semantic("language", "BCP 47 code; rows without it take the source's language")
    group_id: str | None = semantic("group_id", "translation group; default: the row's own")


class PromptSetSource(Source):
    """A set of prompts that is only evaluated, in AlpacaEval's form (instruction) or any other."""

    fields: PromptSetFields = semantic(PromptSetFields(), "column names")


class AnswerFields(Section):
    """Names of the columns in a file of answers; the defaults are AlpacaEval's."""

    prompt: str = semantic("instruction", "the prompt, as it is evaluated: text or messages")
    answer: str = semantic("output", "the answer")
    generator: str = semantic("generator", "who wrote it")
    language: str | None = semantic("language", "BCP 47 code; rows without it take the source's language")


class AnswerSource(Source):
    """Answers to compare with, in AlpacaEval's form (instruction, output, generator) or any other."""

    fields: AnswerFields = semantic(AnswerFields(), "column names")
    generator: str | None = semantic(None, "answers of this one only, where the data has several generators")


class BaselineConfig(Section):
    """What answers are compared with in the win rate; without any: the round-0 policy."""

    answers: list[AnswerSource] = semantic([], "files or data sets of finished answers")
    model: FilePath | None = execution(None, "a model that answers the same prompts: hub id, folder, embedded:NAME")

    @model_validator(mode="after")
    def _one(self) -> BaselineConfig:
        if self.answers and self.model is not None:
            raise ValueError("evaluate.baseline has answers and a model: give one of the two")
        return self

    @property
    def given(self) -> bool:
        """Whether it is another than the round-0 policy."""
        return bool(self.answers) or self.model is not None


class SecondJudge(Section):
    """Another judge of the same comparisons, to see how far the two agree."""

    model: FilePath | None = execution(None, "the second judge: hub id, folder, embedded:NAME; none: there is none")
    engine: EngineConfig | None = semantic(
        None,
        "an engine of its own, for example a server, with the keys of `engine`; default: the run's",
        used_when={".model": other_than(None)},
    )


class BenchmarkConfig(Section):
    """How `evaluate.tasks` are run, by lm-evaluation-harness."""

    folder: FilePath | None = execution(
        None, "task files of your own (YAML) beside the harness's; relative paths of data in them are from this folder"
    )
    trust_code: bool = semantic(
        False,
        "run the Python that task files in `folder` name (`!function`, `class`)",
        used_when={".folder": other_than(None)},
    )
    fewshot: int | None = semantic(None, "solved examples before each question; default: what the task says", ge=0)
    limit: int | None = semantic(None, "first questions of every task only; default: all", ge=1)
    chat_template: bool = semantic(
        False, "put questions into the chat template; the harness's own default is plain text"
    )
    languages: dict[str, str] = semantic(
        {}, "task -> BCP 47 code, for tasks whose name and settings do not say it, or say it wrongly"
    )
    batch_size: int = execution(8, "questions per forward", ge=1, le=1 << 16)

    @field_validator("languages")
    @classmethod
    def _codes(cls, value: dict[str, str]) -> dict[str, str]:
        import langcodes

        from schemas.languages import no_code

        for task, code in value.items():
            if not langcodes.tag_is_valid(code):
                raise ValueError(f"{task}: {no_code(code)}")
        return value


class EvaluateConfig(Section):
    """Evaluate stage (docs/methods.md section 9)."""

    splits: list[Literal["dev", "test", "unseen"]] = semantic(
        ["dev", "test", "unseen"], "held-out prompts and pairs used"
    )
    authored: list[AuthoredSource] = semantic(
        [AuthoredSource(path="package:authored_pairs/{language}.jsonl")],
        "pairs with truth by construction",
    )
    prompts_per_language: int = semantic(50, "most held-out prompts answered per language", ge=0)
    pairs_per_language: int = semantic(200, "most held-out pairs per split and language", ge=0)
    sampling: Sampling = semantic(
        Sampling(temperature=0.0, max_tokens=512),
        "how held-out prompts are answered",
        used_when=_ANSWERED,
    )
    win_rate: bool = semantic(True, "compare answers before and after with the evaluation judge, in both orders")
    tasks: list[str] = semantic(
        [],
        "benchmarks before and after, by their names in lm-evaluation-harness: tasks, groups or tags (docs/evaluation.md; extra [eval])",
    )
    benchmarks: BenchmarkConfig = semantic(
        BenchmarkConfig(), "how `tasks` are run", used_when={".tasks": other_than([])}
    )
    prompts: list[PromptSetSource] = semantic(
        [],
        "prompt sets of their own that are answered and compared, instead of the held-out prompts",
        used_when=_ANSWERED,
    )
    baseline: BaselineConfig = semantic(
        BaselineConfig(), "what both models are compared with; default: after with before", used_when=_COMPARED
    )
    second_judge: SecondJudge = semantic(SecondJudge(), "a second judge of the win rate", used_when=_COMPARED)
    token_budget: int = execution(8192, "padded tokens per forward", ge=64)

    @property
    def sources(self) -> list[Source]:
        """All that is read from outside the run directory."""
        return [*self.authored, *self.prompts, *self.baseline.answers]

    @field_validator("tasks")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        if twice := next((name for name in value if value.count(name) > 1), None):
            raise ValueError(f"{twice} is listed twice")
        if any(not name.strip() for name in value):
            raise ValueError("a task has an empty name")
        return value
