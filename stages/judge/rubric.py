"""Rubric files: what a judge is told, in the language of the prompt."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.errors import UserError
from schemas.languages import base_language
from stages.data import PREFIX, data_path
from stages.text.language import same_language

FALLBACK = "en"


class _Texts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScoreTexts(_Texts):
    """Texts of a rubric that scores one answer."""

    instructions: str
    prompt_label: str
    answer_label: str
    ask: str


class PairTexts(_Texts):
    """Texts of a rubric that compares two answers."""

    instructions: str
    prompt_label: str
    answer_a_label: str
    answer_b_label: str
    ask: str


class Rubric(_Texts):
    """A rubric file (see data/rubrics/README.md)."""

    language: str
    language_name: str
    expected_score: ScoreTexts
    additive: ScoreTexts
    pairwise: PairTexts


def rubric_path(template: str, language: str) -> Path:
    """The rubric file for a language: its own, its base language's (zh for zh-Hant), or English.

    template: a path with {language} in it, or `package:` and a path inside data/.
    Raises UserError if none of them is there.
    """
    codes = list(dict.fromkeys([language, base_language(language), FALLBACK]))
    tried = [_path(template.replace("{language}", code)) for code in codes]
    for path in tried:
        if os.path.isfile(path):
            return path
    raise UserError(
        f"There is no judge rubric for {language}",
        where=f"judge.rubric: {template}",
        fix=f"Looked for {', '.join(path.name for path in tried)}; copy data/rubrics/en.yaml there and translate it.",
    )


def load_rubric(template: str, language: str) -> Rubric:
    """The rubric for a language (see `rubric_path`). Raises UserError naming the file and the key that is wrong."""
    path = rubric_path(template, language)
    try:
        return Rubric.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"A judge rubric is not as it should be: {key}: {first['msg']}",
            where=str(path),
            fix="data/rubrics/README.md lists the keys.",
        ) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"A judge rubric cannot be read: {' '.join(str(error).split())}", where=str(path)) from error


class Rubrics:
    """Rubrics by language, each read once. note: told of a language without one of its own. Raises UserError as `load_rubric`."""

    def __init__(self, template: str, note: Callable[[str], None]) -> None:
        self._template, self._note = template, note
        self._loaded: dict[str, Rubric] = {}

    def of(self, language: str) -> Rubric:
        """The rubric for a language."""
        if language not in self._loaded:
            rubric = load_rubric(self._template, language)
            if not same_language(rubric.language, language):
                self._note(f"no judge rubric for {language}: using the one in {rubric.language}")
            self._loaded[language] = rubric
        return self._loaded[language]


def _path(name: str) -> Path:
    return Path(str(data_path(name))) if name.startswith(PREFIX) else Path(name)
