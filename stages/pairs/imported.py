"""Pairs that somebody else made: flat or conversational preference data sets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import takewhile
from typing import Any

from schemas.config.sources import PairFields, PairSource
from schemas.ids import canonical_json, content_id
from stages.contract import Context, Drop, Stopped
from stages.pairs.finish import Draft
from stages.sources import Batch, columns_of, read_rows
from stages.text.assign import RunLanguages, Splitter, group_of
from stages.text.language import UNKNOWN
from stages.text.messages import BadRow, Messages, comparable, read_messages, read_prompt, spoken

_OPTIONAL = ("prompt", "language", "group_id")


@dataclass(frozen=True)
class RawPair:
    """A pair as the data has it, cleaned; prompt ends in a user turn."""

    prompt: Messages
    chosen: str
    rejected: str


def read_pair(prompt: Any, chosen: Any, rejected: Any) -> RawPair:
    """Clean prompt and answers from texts or message lists.

    When chosen and rejected are whole conversations the messages they share are the prompt, as in TRL's
    `extract_prompt`. Raises BadRow: as read_prompt, and no_prompt, several_answers (more than one assistant message, or
    another role, after the shared part), identical (the answers are the same after normalisation).
    """
    sides = [read_messages(side, role="assistant") for side in (chosen, rejected)]
    if all(side[0]["role"] != "assistant" for side in sides):
        both = zip(*sides, strict=False)
        shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], both)]
        if not shared:
            raise BadRow("no_prompt", "the two conversations share no message")
        if all(len(side) == len(shared) for side in sides):
            raise BadRow("identical")
        prompt, sides = shared, [side[len(shared) :] for side in sides]
    elif prompt is None:
        raise BadRow("no_prompt", "the answers are no whole conversations either")
    messages = read_prompt(prompt)
    for side in sides:
        if len(side) != 1 or side[0]["role"] != "assistant":
            raise BadRow("several_answers", f"{len(side)} messages after the prompt, roles {[m['role'] for m in side]}")
    answers = [side[0]["content"] for side in sides]
    if comparable(answers[0]) == comparable(answers[1]):
        raise BadRow("identical")
    return RawPair(messages, answers[0], answers[1])


class Imported:
    """Drafts of pairs from pairs.sources.

    Unit row. Drop reasons: those of `read_pair`, of RunLanguages (language_not_in_run, wrong_language, ...), bad_score,
    duplicate. A language is checked on prompt and chosen answer together. drops grows while drafting.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        config = ctx.config
        self._languages = RunLanguages(config.languages)
        self._splitter = Splitter(
            config.seed,
            config.languages.unseen,
            config.pairs.dev_fraction,
            config.pairs.test_fraction,
            remember=any(source.fields.split for source in config.pairs.sources),
        )
        self._rows: Counter[str] = Counter()
        self._seen: dict[bytes, str] = {}
        self.drops: list[Drop] = []
        self._readers = [(source, self._open(source)) for source in config.pairs.sources]
        for note in self._languages.notes:
            ctx.progress.note(note)

    @property
    def amount(self) -> int:
        """0: how many rows the sources have is known when they are read."""
        return 0

    def units(self) -> dict[str, Iterator[str]]:
        """unit -> the language of every row that came in."""
        return {"row": self._rows.elements()}

    def drafts(self) -> Iterator[list[Draft]]:
        """A batch of drafts a batch of rows, in the order of the sources."""
        for source, batches in self._readers:
            for batch in batches:
                if self._ctx.stop():
                    raise Stopped
                yield self._batch(batch, source.fields)
        if self._splitter.moved:
            self._ctx.progress.note(f"{self._splitter.moved} rows took their translation group's split, not their own")

    def _open(self, source: PairSource) -> Iterator[Batch]:
        required, optional = columns_of(source.fields, _OPTIONAL)
        return read_rows(source, self._languages.codes, required, optional)

    def _batch(self, batch: Batch, fields: PairFields) -> list[Draft]:
        rows: list[tuple[str, dict[str, Any], str | None, RawPair]] = []
        for number, cells in enumerate(batch.rows, start=batch.start):
            row_id, language = f"{batch.source}:{number}", None
            try:
                language = self._languages.label(_cell(cells, fields.language), batch.language)
                pair = read_pair(_cell(cells, fields.prompt), cells[fields.chosen], cells[fields.rejected])
                rows.append((row_id, cells, language, pair))
            except BadRow as bad:
                self._drop(row_id, language, bad)
        found = self._languages.identify([f"{spoken(pair.prompt)}\n{pair.chosen}" for _, _, _, pair in rows])
        drafts = []
        for (row_id, cells, label, pair), (detected, confidence) in zip(rows, found, strict=True):
            language = label
            try:
                language = self._languages.settle(label, detected, confidence)
                drafts.append(self._draft(row_id, cells, language, pair, fields, batch.source))
                self._rows[language] += 1
            except BadRow as bad:
                self._drop(row_id, language, bad)
        return drafts

    def _draft(
        self, row_id: str, cells: dict[str, Any], language: str, pair: RawPair, fields: PairFields, source: str
    ) -> Draft:
        scores = [_score(_cell(cells, name)) for name in (fields.chosen_score, fields.rejected_score)]
        self._check_new(row_id, language, pair)
        prompt_id = content_id(language, pair.prompt)
        group_id = group_of(_cell(cells, fields.group_id), prompt_id)
        return Draft(
            unit="row",
            row_id=row_id,
            language=language,
            split=self._splitter.split(language, group_id, _cell(cells, fields.split) or None, row_id),
            group_id=group_id,
            prompt_id=prompt_id,
            prompt=pair.prompt,
            chosen=pair.chosen,
            rejected=pair.rejected,
            source=source,
            chosen_score=scores[0],
            rejected_score=scores[1],
        )

    def _check_new(self, row_id: str, language: str, pair: RawPair) -> None:
        parts = [language, *(comparable(text) for text in (spoken(pair.prompt), pair.chosen, pair.rejected))]
        digest = blake2b(canonical_json(parts).encode(), digest_size=16).digest()
        first = self._seen.setdefault(digest, row_id)
        if first != row_id:
            raise BadRow("duplicate", f"of {first}")

    def _drop(self, row_id: str, language: str | None, bad: BadRow) -> None:
        self._rows[language or UNKNOWN] += 1
        self.drops.append(Drop("row", row_id, language or UNKNOWN, bad.reason, bad.detail))


def _cell(cells: dict[str, Any], column: str | None) -> Any:
    return cells.get(column) if column else None


def _score(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        score = float(value)
    except (TypeError, ValueError) as error:
        raise BadRow("bad_score", f"{str(value)[:40]!r} is not a number") from error
    return None if math.isnan(score) else score
