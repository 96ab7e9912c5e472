"""Which language of the run a row belongs to, and which split its translation group belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import langcodes

from schemas.config.sources import LanguageConfig
from schemas.errors import UserError
from schemas.ids import unit_interval
from stages.text.language import UNKNOWN, identify, same_language, unidentifiable
from stages.text.messages import BadRow, clean

UNSEEN = "unseen"
_SPLITS = ("train", "dev", "test")


class RunLanguages:
    """The run's languages: matches codes to them and checks texts against them.

    notes: languages the identifier does not know; for those nothing is dropped.
    """

    def __init__(self, config: LanguageConfig) -> None:
        self.codes = [*config.seen, *config.unseen]
        self._config = config
        self._unidentifiable = set(unidentifiable(self.codes)) if config.identify else set(self.codes)
        self.notes = [
            f"the identifier does not know {code}: its texts are taken as labelled"
            for code in self.codes
            if config.identify and code in self._unidentifiable
        ]

    def label(self, cell: Any, default: str | None) -> str | None:
        """The run's language of a row's cell or, where the cell says nothing, of its source; None: to be identified.

        Raises BadRow as `match` does.
        """
        code = "" if cell is None else str(cell).strip()
        wanted = default if code in ("", UNKNOWN) else code
        return None if wanted is None else self.match(wanted)

    def match(self, code: str) -> str:
        """The run's language that a row's code stands for: the same tag, else the only one it is a variety of.

        en-US stands for en; zh-TW for zh but, being written in another script, not for zh-Hans.

        Raises BadRow: invalid_language, language_not_in_run.
        """
        standard = _standard(code)
        if standard is None:
            raise BadRow("invalid_language", f"{code[:40]!r} is not a BCP 47 code")
        for language in self.codes:
            if _standard(language) == standard:
                return language
        related = [
            language
            for language in self.codes
            if same_language(standard, language) and _script_fits(standard, language)
        ]
        if len(related) != 1:
            raise BadRow("language_not_in_run", standard)
        return related[0]

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """As stages.text.language.identify; ("und", 0.0) everywhere when the config turns identification off."""
        return identify(texts, self.codes) if self._config.identify else [(UNKNOWN, 0.0)] * len(texts)

    def settle(self, label: str | None, detected: str, confidence: float) -> str:
        """The row's language: its label if the text does not speak against it, the detected one if it has no label.

        Raises BadRow: low_confidence, wrong_language, no_language (no label and identification is off).
        """
        if label in self._unidentifiable:
            return str(label)
        if label is None and not self._config.identify:
            raise BadRow("no_language", "no language column, and languages.identify is off")
        if confidence < self._config.min_confidence or (label is None and detected == UNKNOWN):
            raise BadRow("low_confidence", f"{detected} {confidence:.2f} < {self._config.min_confidence}")
        if label is None:
            return self.match(detected)
        if detected != UNKNOWN and not same_language(detected, label):
            raise BadRow("wrong_language", f"{detected} {confidence:.2f}")
        return label


class Splitter:
    """Splits by hash of (seed, translation group): the same group is in the same split in every language and table.

    remember: some source may override the hash; what a group's first row got is then kept for the whole group.
    moved: rows whose own override lost to their group's split.
    """

    def __init__(
        self, seed: int, unseen: Sequence[str], dev_fraction: float, test_fraction: float, remember: bool
    ) -> None:
        self._seed, self._unseen = seed, frozenset(unseen)
        self._dev, self._test = dev_fraction, test_fraction
        self._groups: dict[str, str] | None = {} if remember else None
        self.moved = 0

    def split(self, language: str, group_id: str, override: Any, row_id: str) -> str:
        """train, dev or test; unseen for every row of an unseen language. Raises UserError for another override."""
        if override is not None and override not in _SPLITS:
            raise UserError(
                f"{str(override)[:40]!r} is not a split",
                where=f"row {row_id}",
                fix="The column named in fields.split holds train, dev or test, or nothing for the hash split.",
            )
        if language in self._unseen:
            return UNSEEN
        hashed = self._hashed(group_id)
        if self._groups is None:
            return hashed
        split = self._groups.setdefault(group_id, override or hashed)
        self.moved += override is not None and override != split
        return split

    def _hashed(self, group_id: str) -> str:
        position = unit_interval(self._seed, "split", group_id)
        if position < self._dev:
            return "dev"
        return "test" if position < self._dev + self._test else "train"


def group_of(cell: Any, default: str) -> str:
    """The translation group a row names, or `default`."""
    return (clean(str(cell)) if cell is not None else "") or default


def _script_fits(code: str, language: str) -> bool:
    wanted = langcodes.Language.get(language).script
    return wanted is None or langcodes.Language.get(code).maximize().script == wanted


@lru_cache(maxsize=4096)
def _standard(code: str) -> str | None:
    code = code.strip()
    if not langcodes.tag_is_valid(code):
        return None
    standard = langcodes.standardize_tag(code)
    return standard if langcodes.Language.get(standard).is_valid() else None
