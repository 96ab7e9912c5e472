"""Config of the data a run starts from."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator, model_validator

from schemas.config.base import FilePath, Section, other_than, semantic

_ON_THE_HUB = {".format": ("auto", "hub")}
_OF_ANSWERS = {".completions": other_than(None)}
_OF_A_PAIR = {".completions": None}
WRITERS = ("chosen_model", "rejected_model", "completion_model")
"""Fields of pairs that name the column, or key, of who wrote an answer."""


class Source(Section):
    """One data set: a local file (Parquet, Arrow, JSONL, JSON, CSV, TSV; globs allowed) or a Hugging Face dataset id.

    `{language}` in path stands for each language of the run; that language is then the rows' language.
    `package:` as prefix reads a file shipped in data/. has_splits: rows are of train, dev or test; where they are not, a local file
    has no `split`.
    """

    has_splits: ClassVar[bool] = False

    path: FilePath = semantic(
        description="file or glob (from the working directory), package:FILE or hub dataset id; {language}: of each language"
    )
    name: str | None = semantic(None, "hub: configuration name", used_when=_ON_THE_HUB)
    split: str | None = semantic(
        None,
        "hub: the split to read, default train; of a local file of prompts or pairs to train on: the split of all its rows (train, dev or"
        " test), default: each row's own",
    )
    revision: str | None = semantic(
        None, "hub: revision; without one, a later change on the hub is not noticed", used_when=_ON_THE_HUB
    )
    format: Literal["auto", "parquet", "arrow", "jsonl", "json", "csv", "hub"] = semantic(
        "auto", "auto: by the file's ending; csv: with any delimiter"
    )
    delimiter: str | None = semantic(
        None,
        "csv: one character; default: the comma, tab, semicolon or bar that the header has",
        used_when={".format": ("auto", "csv")},
        min_length=1,
        max_length=1,
    )
    language: str | None = semantic(None, "language of every row, when there is no such column")
    limit: int | None = semantic(None, "first rows of each file (hub: of the split) only", ge=1)

    @field_validator("language")
    @classmethod
    def _a_language(cls, value: str | None) -> str | None:
        from schemas.languages import no_code

        if value is not None and (wrong := no_code(value, names_too=True)) is not None:
            raise ValueError(wrong)
        return value

    @property
    def hub_split(self) -> str:
        """The split that is read of a Hugging Face dataset."""
        return self.split or "train"

    @property
    def may_name_split(self) -> bool:
        """Whether a key speaks of the split of its rows. Of a data set on the hub, which only its path can tell, `split` alone does not
        (`stages.sources.names_splits`)."""
        columns = getattr(self, "fields", None)
        return bool(self.split or getattr(self, "splits", None) or getattr(columns, "split", None))


Splits = dict[str, Literal["train", "dev", "test"]]
_SPLITS = (
    "what the data calls its splits -> train, dev or test, for example {test_prefs: test}: values of fields.split, or the "
    "source's own `split`"
)


_MANY = (
    "rows with several rejected answers or scored completions: one pair (the first rejected that is not chosen; best against worst), or "
    "chosen (the best) against every other"
)


class PromptFields(Section):
    """Names of the columns in the source."""

    prompt: str = semantic("prompt", "text, or a list of messages ending in a user turn")
    system: str | None = semantic(None, "system message")
    language: str | None = semantic("language", "BCP 47 code; rows without it take the source's language")
    group_id: str | None = semantic("group_id", "translation group; default: the row's own")
    split: str | None = semantic(None, "train | dev | test, to override the hash split")


class PromptSource(Source):
    """A data set of prompts."""

    has_splits = True

    fields: PromptFields = semantic(PromptFields(), "column names")
    splits: Splits = semantic({}, _SPLITS)


class PairColumns(Section):
    """Names of the columns that a pair is made of."""

    prompt: str = semantic("prompt", "text or messages; may be absent if chosen and rejected hold whole conversations")
    chosen: str = semantic("chosen", "text or messages")
    rejected: str = semantic("rejected", "text or messages, or a list of several answers (`many`)")
    completions: str | None = semantic(
        None, "instead of chosen and rejected: the prompt's answers, a list of objects or of texts (`many`)"
    )
    completion_text: str = semantic("response", "completions: key of an answer's text", used_when=_OF_ANSWERS)
    completion_score: str = semantic(
        "overall_score",
        "completions: key of an answer's score; of texts: the column with the list of their scores",
        used_when=_OF_ANSWERS,
    )
    system: str | None = semantic(None, "system message")
    language: str | None = semantic("language", "BCP 47 code")
    group_id: str | None = semantic("group_id", "translation group; default: the prompt's own")

    @property
    def no_columns(self) -> tuple[str, ...]:
        """Fields that name no column of their own here."""
        return ("completion_text", "completion_score", *(("chosen", "rejected") if self.completions else ()))


class PairFields(PairColumns):
    """Names of the columns in a preference data set."""

    split: str | None = semantic(None, "train | dev | test, to override the hash split")
    chosen_score: str | None = semantic(
        None, "score of chosen: a number, 7/10, 85%; what cannot be read is no score", used_when=_OF_A_PAIR
    )
    rejected_score: str | None = semantic(None, "score of rejected", used_when=_OF_A_PAIR)
    chosen_model: str | None = semantic(
        None,
        "the model that wrote chosen: how many answers are the policy's own is then said (`on_policy`)",
        used_when=_OF_A_PAIR,
    )
    rejected_model: str | None = semantic(None, "the model that wrote rejected", used_when=_OF_A_PAIR)
    completion_model: str | None = semantic(
        None, "completions: key of the model that wrote an answer", used_when=_OF_ANSWERS
    )
    label_error: str | None = semantic(
        None,
        "what is known to be wrong with a row, in a word (flip, off_topic), empty where nothing is: never used to curate, only to say at"
        " the end how many were found",
    )

    @property
    def no_columns(self) -> tuple[str, ...]:
        """Fields that name no column of their own here."""
        return (*super().no_columns, "completion_model")


class PairSource(Source):
    """A preference data set."""

    has_splits = True

    fields: PairFields = semantic(PairFields(), "column names")
    splits: Splits = semantic({}, _SPLITS)
    many: Literal["one", "all"] = semantic("one", _MANY)
    on_policy: list[str] = semantic(
        [],
        "models in those columns that are the policy; default: model.policy's own name, its owner and case aside",
        used_when=tuple({f".fields.{key}": other_than(None)} for key in WRITERS),
    )


class AuthoredSource(Source):
    """Pairs that are only evaluated."""

    fields: PairColumns = semantic(PairColumns(), "column names")
    many: Literal["one", "all"] = semantic("one", _MANY)

    @property
    def pairs(self) -> PairSource:
        """As a preference data set."""
        return PairSource.model_validate(self.model_dump())


class LanguageConfig(Section):
    """Languages of the run (BCP 47)."""

    seen: list[str] = semantic(description="languages that are trained on", min_length=1)
    unseen: list[str] = semantic([], "languages only evaluated")
    min_confidence: float = semantic(
        0.5,
        "identifier's probability below which a row is dropped; 0: never",
        used_when={"languages.identify": True},
        ge=0,
        le=1,
    )
    identify: bool = semantic(True, "identify the language of prompts and answers")

    @model_validator(mode="after")
    def _codes(self) -> LanguageConfig:
        from schemas.languages import no_code, standard

        spelt: dict[str | None, list[str]] = {}
        for code in self.codes:
            if (wrong := no_code(code)) is not None:
                raise ValueError(wrong)
            spelt.setdefault(standard(code), []).append(code)
        for same in spelt.values():
            if len(same) > 1:
                raise ValueError(f"{', '.join(same)} are one language, listed twice in seen and unseen")
        return self

    @property
    def codes(self) -> list[str]:
        """Of all languages of the run, those that are trained on first."""
        return [*self.seen, *self.unseen]


class PromptsConfig(Section):
    """Prompts stage: read, clean, deduplicate, split."""

    sources: list[PromptSource] = semantic([], "where prompts come from")
    near_duplicate_threshold: float = semantic(
        0.8, "Jaccard of character 5-grams at which a later prompt is dropped; 1: off", gt=0, le=1
    )
    min_chars: int = semantic(2, "shorter prompts are dropped", ge=1)
    max_chars: int = semantic(20000, "longer prompts are dropped", ge=1)
    dev_fraction: float = semantic(0.05, "share of translation groups for choices", ge=0, lt=1)
    test_fraction: float = semantic(0.1, "share of translation groups for figures", ge=0, lt=1)

    @model_validator(mode="after")
    def _room_to_train(self) -> PromptsConfig:
        if self.dev_fraction + self.test_fraction >= 1:
            raise ValueError("prompts.dev_fraction + prompts.test_fraction must leave something to train on")
        if self.max_chars < self.min_chars:
            raise ValueError(f"prompts.max_chars: {self.max_chars} is less than prompts.min_chars: {self.min_chars}")
        return self
