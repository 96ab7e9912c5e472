"""Pairs that somebody else made: preference data sets in the layouts of docs/data.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

from schemas.config.sources import PairSource
from schemas.errors import UserError
from schemas.ids import canonical_json, content_id
from schemas.languages import UNKNOWN
from stages.beside import unread_folder
from stages.cells import MISSING_WORDS
from stages.contract import Context, Drop, Stopped
from stages.layout import LOOKED_AT
from stages.pairs.finish import Draft
from stages.pairs.looks import Looks
from stages.pairs.read import RawPair, is_several, pairs_of
from stages.source_kinds import batches_of
from stages.sources import Batch, excerpt, names_splits
from stages.text.assign import Label, RunLanguages, Splitter, Spoken, assumed_said, group_of
from stages.text.messages import BadRow, comparable, spoken, storable
from stages.text.misread import has_lost
from stages.text.refusals import refusal
from stages.text.thoughts import Thoughts

LABEL_ERRORS = "label_error "
"""Begins the name of the stat that counts the rows with a known error of a kind, kept or not."""
MOST_KINDS = 30
_LONGEST_KIND = 40
_STRAYS, _STRAYING = 2, 0.02
"""Pairs of a language, and their share, from which it is said that the chosen answer is in another language: fewer may be the task."""
_NO_ANSWERS = MISSING_WORDS | {"", "[]", "{}", "[deleted]", "[removed]", "#NAME?", "#REF!", "#VALUE!", "#DIV/0!"}
"""Answers that may say that there is none: learnt all the same, and counted."""
_NOTHING_WRONG = ("", "false", "0", "0.0", "no", "none", "ok")


class Imported:
    """Drafts of pairs from pairs.sources.

    Unit row; a row with several pairs counts once a pair (`FILE:3#2`). Drop reasons: those of `pairs_of`, of RunLanguages
    (language_not_in_run, wrong_language, ...), refusal, rated_below, tie (scores that differ by less than pairs.min_margin), duplicate.
    drops grows while drafting, stats too: on_policy_share (of the answers whose writer the data names), unread_scores, rated_below,
    opposite_pairs (there both ways round), lost_characters (pairs with U+FFFD, or ï¿½), labels_overruled, off_language_chosen (pairs whose chosen answer
    is in another language and whose rejected one is in their own), and rows by known error (`LABEL_ERRORS` and the kind).
    longest_text: characters from which a text is dropped (too_long) before anything looks at it.
    """

    def __init__(self, ctx: Context, thoughts: Thoughts, longest_text: int) -> None:
        self._ctx, self._thoughts, self._longest = ctx, thoughts, longest_text
        config = ctx.config
        self._languages = RunLanguages(config.languages)
        self._splitter = Splitter(
            config.seed,
            config.languages.unseen,
            config.pairs.dev_fraction,
            config.pairs.test_fraction,
            remember=any(map(names_splits, config.pairs.sources)),
        )
        self._rows: Counter[str] = Counter()
        self._seen: dict[bytes, str] = {}
        self._opposite: tuple[str, str] | None = None
        self._kept: Counter[str] = Counter()
        self._strays: Counter[str] = Counter()
        self._first_stray: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._first_lost = ""
        self.drops: list[Drop] = []
        self._readers = [(source, batches_of(source, self._languages.codes)) for source in config.pairs.sources]
        for note in self._languages.notes:
            ctx.progress.note(note)

    @property
    def amount(self) -> int:
        """0: how many rows the sources have is known when they are read."""
        return 0

    @property
    def stats(self) -> dict[str, float]:
        """What was counted over all rows."""
        said = self._counts["writers"]
        return {
            **({"on_policy_share": self._counts["own_answers"] / said} if said else {}),
            "unread_scores": float(self._counts["unread_scores"]),
            "rated_below": float(self._counts["rated_below"]),
            "opposite_pairs": float(self._counts["opposite"]),
            "lost_characters": float(self._counts["lost"]),
            "labels_overruled": float(self._languages.overruled),
            "off_language_chosen": float(self._strays.total()),
            **{f"{LABEL_ERRORS}{kind}": float(count) for kind, count in self._errors.items()},
        }

    @property
    def held_out(self) -> Callable[[Sequence[str]], str]:
        """Languages -> why their rows are not trained on."""
        return self._splitter.held_out

    def units(self) -> dict[str, Iterator[str]]:
        """unit -> the language of every row that came in."""
        return {"row": self._rows.elements()}

    def drafts(self) -> Iterator[list[Draft]]:
        """A batch of drafts a batch of rows, in the order of the sources."""
        for source, batches in self._readers:
            looks = Looks()
            for batch in batches:
                if self._ctx.stop():
                    raise Stopped
                if batch.language is None and not self._counts["folders"] and (folder := unread_folder(batch.source)):
                    self._counts["folders"] += 1
                    batch.notes.append(folder)
                for note in batch.notes:
                    self._ctx.progress.note(f"{batch.source}: {note}")
                yield self._batch(batch, source, looks)
            for note in looks.notes():
                self._ctx.progress.note(f"{source.path}: {note}")
        for note in self._summary():
            self._ctx.progress.note(note)

    def _summary(self) -> Iterator[str]:
        yield from self._splitter.notes()
        if several := self._counts["several"]:
            yield f"{several:,} rows have several rejected answers: the first of each that is not chosen is taken (`many: all` takes every one)"
        if unsaid := self._counts["no_answer"]:
            yield f"{unsaid:,} pairs have an answer that may only say that there is none (NULL, NA, [], [deleted], ...): it is learnt as text"
        if self._opposite is not None:
            yield (
                f"{self._counts['opposite']:,} pairs are there both ways round: one row prefers what another rejects, for example "
                f"{self._opposite[0]} and {self._opposite[1]}. Both are learnt: leave out the wrong one, or both"
            )
        if lost := self._counts["lost"]:
            yield (
                f"{lost:,} pairs hold U+FFFD, which stands for characters that were lost before (or for half ones, which no table "
                f"can hold), first {self._first_lost}: it is learnt as text"
            )
        if below := self._counts["rated_below"]:
            yield f"{below:,} pairs are dropped because the data rates chosen below rejected (rated_below)"
        if said := self._counts["writers"]:
            yield f"{self._counts['own_answers'] / said:.0%} of {said:,} imported answers were written by the policy (on_policy_share)"
        else:
            yield "nothing says who wrote the imported answers (fields.chosen_model, rejected_model): which are the policy's own is not known"
        if unread := self._counts["unread_scores"]:
            yield f"{unread:,} scores cannot be read as a number: these pairs go on without, completions are left out"
        if overruled := self._languages.overruled:
            yield f"{overruled:,} rows keep their label although the language identifier does not confirm it"
        if assumed := self._languages.assumed:
            yield assumed_said(assumed, self._languages.codes[0])
        for language, strays in self._strays.items():
            if strays >= max(_STRAYS, _STRAYING * self._kept[language]):
                yield (
                    f"{strays:,} of {self._kept[language]:,} pairs in {language} have a chosen answer in another language and a rejected one "
                    f"in {language} (for example {self._first_stray[language]}): training on them teaches not to answer in {language}; "
                    "write these answers anew, or take the rows out"
                )

    def _batch(self, batch: Batch, source: PairSource, looks: Looks) -> list[Draft]:
        rows: list[tuple[str, dict[str, Any], Label | None, RawPair]] = []
        for number, cells in enumerate(batch.rows, start=batch.start):
            found = list(pairs_of(cells, source, self._longest))
            if number <= LOOKED_AT:
                looks.row(f"{batch.source}:{number}", cells, found)
            if error := label_error(_cell(cells, source.fields.label_error)):
                self._errors[error] += len(found)
                self._check_kinds(source)
            for place, pair in enumerate(found, start=1):
                row_id = f"{batch.source}:{number}" + (f"#{place}" if len(found) > 1 else "")
                try:
                    label = self._languages.label(_cell(cells, source.fields.language), batch.language)
                except BadRow as bad:
                    self._drop(row_id, None, bad, cells)
                    continue
                if isinstance(pair, BadRow):
                    self._drop(row_id, label[0] if label else None, pair, cells)
                else:
                    rows.append((row_id, cells, label, pair))
        texts = [text for _, _, _, pair in rows for text in (spoken(pair.prompt), pair.chosen)]
        guesses = self._languages.guess(texts)
        drafts = []
        for at, (row_id, cells, label, pair) in enumerate(rows):
            both = [Spoken(texts[n], guesses[n]) for n in (2 * at, 2 * at + 1)]
            language = label[0] if label else None
            try:
                language = self._languages.settle(label, both)
                drafts.append(self._draft(row_id, cells, language, pair, source, batch))
                self._rows[language] += 1
                self._kept[language] += 1
                if self._languages.chosen_strays(language, both[0], both[1], pair.rejected):
                    self._strays[language] += 1
                    self._first_stray.setdefault(language, row_id)
                several = cells.get(source.fields.rejected)
                self._counts["several"] += source.many == "one" and is_several(several) and len(several or ()) > 1
                self._counts["no_answer"] += bool({pair.chosen, pair.rejected} & _NO_ANSWERS)
                if any(map(has_lost, (texts[2 * at], pair.chosen, pair.rejected))):
                    self._counts["lost"] += 1
                    self._first_lost = self._first_lost or row_id
            except BadRow as bad:
                self._drop(row_id, language, bad, cells)
        return drafts

    def _draft(
        self, row_id: str, cells: dict[str, Any], language: str, pair: RawPair, source: PairSource, batch: Batch
    ) -> Draft:
        self._counts["unread_scores"] += pair.unread
        self._check_refusals(language, pair)
        self._check_scores(pair)
        self._check_new(row_id, language, pair)
        self._count_writers(pair, source)
        prompt_id = content_id(language, pair.prompt)
        group_id = group_of(_cell(cells, source.fields.group_id), prompt_id)
        own = _cell(cells, source.fields.split)
        return Draft(
            unit="row",
            row_id=row_id,
            language=language,
            split=self._splitter.split(
                language, group_id, own or batch.split, row_id, source.splits if own else None, source.path
            ),
            group_id=group_id,
            prompt_id=prompt_id,
            prompt=pair.prompt,
            chosen=pair.chosen,
            rejected=pair.rejected,
            source=batch.source,
            chosen_score=pair.chosen_score,
            rejected_score=pair.rejected_score,
            label_error=label_error(_cell(cells, source.fields.label_error)) if source.fields.label_error else None,
        )

    def _count_writers(self, pair: RawPair, source: PairSource) -> None:
        own = {_model_name(name) for name in source.on_policy or [self._ctx.config.model.policy]}
        written = [_model_name(writer) for writer in pair.writers if writer]
        self._counts["writers"] += len(written)
        self._counts["own_answers"] += sum(writer in own for writer in written)

    def _check_kinds(self, source: PairSource) -> None:
        if len(self._errors) > MOST_KINDS:
            raise UserError(
                f"column {source.fields.label_error!r} says more than {MOST_KINDS} different things, for example {next(iter(self._errors))!r}",
                where="pairs.sources.fields.label_error",
                fix="It is a kind of error in a word, as flip or off_topic, and empty where nothing is wrong.",
            )

    def _check_refusals(self, language: str, pair: RawPair) -> None:
        if not self._ctx.config.pairs.drop_refusals:
            return
        for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if found := refusal(self._thoughts.said(answer), language):
                raise BadRow("refusal", f"{side}: {found}")

    def _check_scores(self, pair: RawPair) -> None:
        if pair.chosen_score is None or pair.rejected_score is None:
            return
        margin, least = pair.chosen_score - pair.rejected_score, self._ctx.config.pairs.min_margin
        if margin < 0:
            self._counts["rated_below"] += 1
            raise BadRow("rated_below", f"chosen {pair.chosen_score:g}, rejected {pair.rejected_score:g}")
        if margin < least:
            raise BadRow("tie", f"gap {margin:.4g}, min_margin {least}")

    def _check_new(self, row_id: str, language: str, pair: RawPair) -> None:
        asked = "\n".join(message["content"] for message in pair.prompt)
        asked, chosen, rejected = (comparable(text) for text in (asked, pair.chosen, pair.rejected))
        if chosen == rejected:  # they differ in case or white space
            chosen, rejected = pair.chosen, pair.rejected
        digest = _digest(language, asked, chosen, rejected)
        if (first := self._seen.get(digest)) is not None:
            again = "the same pair, in a row of the same name: is the source listed twice?"
            raise BadRow("duplicate", f"of {first}" if first != row_id else again)
        self._seen[digest] = row_id
        if (other := self._seen.get(_digest(language, asked, rejected, chosen))) is not None:
            self._counts["opposite"] += 1
            self._opposite = self._opposite or (other, row_id)

    def _drop(self, row_id: str, language: str | None, bad: BadRow, cells: dict[str, Any]) -> None:
        self._rows[language or UNKNOWN] += 1
        self.drops.append(Drop("row", row_id, language or UNKNOWN, bad.reason, bad.detail, text=excerpt(cells)))


def _digest(*texts: str) -> bytes:
    return blake2b(canonical_json(list(texts)).encode(), digest_size=16).digest()


def _cell(cells: dict[str, Any], column: str | None) -> Any:
    return cells.get(column) if column else None


def _model_name(name: str) -> str:
    """What two names of a model are compared by: the last part of a hub id or path, in lower case."""
    return name.rstrip("/").rpartition("/")[2].casefold()


def label_error(cell: Any) -> str:
    """The kind of a known error, in a word; empty where the cell says that nothing is wrong (nothing, false, 0, none, ok)."""
    if isinstance(cell, bool) or (isinstance(cell, (int, float)) and cell in (0, 1)):
        return "error" if cell else ""
    text = storable("_".join(str(cell).split()))[:_LONGEST_KIND] if cell is not None else ""
    return {"true": "error", "1": "error"}.get(text.lower(), "" if text.lower() in _NOTHING_WRONG else text)
