"""The prompts and pairs that are evaluated: held out in round 0, or authored; none of them in training."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import polars as pl

from schemas.config.evaluation import PromptSetSource
from schemas.config.sources import PairSource, Source
from schemas.errors import UserError
from schemas.ids import content_id, seed_for
from schemas.languages import UNKNOWN
from schemas.manifests import Tally
from stages.contract import Context, Drop, tally
from stages.evaluate.leak import TrainingRows, training_rows
from stages.pairs.read import RawPair, pairs_of
from stages.source_kinds import batches_of
from stages.sources import excerpt, local_files
from stages.text.assign import RunLanguages, Spoken, group_of
from stages.text.language import Guess
from stages.text.messages import BadRow, Messages, read_prompt, spoken
from stages.text.render import PairIds, Renderer, RenderError

AUTHORED = "authored"


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt to answer."""

    row_id: str
    group_id: str
    language: str
    split: str
    prompt: Messages


@dataclass(frozen=True)
class HeldOutPair(HeldOutPrompt):
    """A pair to score; ids: its tokens."""

    ids: PairIds


Preferred = Callable[[Sequence[HeldOutPrompt]], Container[str]]
"""Of all prompts that may be asked, the row ids of those that are drawn before any other."""


@dataclass(frozen=True)
class _Candidate:
    """A row before the rules. foreign: its group_id is a name in a data set that training does not read."""

    unit: str
    row_id: str
    prompt_id: str
    group_id: str
    language: str
    split: str
    prompt: Messages
    chosen: Messages
    rejected: Messages
    foreign: bool = False

    @property
    def asked(self) -> HeldOutPrompt:
        """As a prompt."""
        return HeldOutPrompt(self.row_id, self.group_id, self.language, self.split, self.prompt)


class HeldOut:
    """What is evaluated, and the account of what is not.

    Units: pair (held-out and authored ones), prompt, comparison (of two answers by the judge), question (of a benchmark); row for authored
    rows, and those of prompt sets and of a baseline's answers, that cannot be read. Drop reasons:
    in_training, translation_of_training, not_sampled (over the configured number per language), too_long, those of
    stages.pairs.read.pairs_of, thought, broken_thought; failed: cannot_render.

    Translation groups of training are groups here too, but for prompt sets that training does not read: in another data set the same
    group_id is another thing. Authored pairs are written beside the run's data, and share its groups.
    """

    def __init__(self, ctx: Context, renderer: Renderer, preferred: Preferred | None = None) -> None:
        self._ctx, self._config, self._renderer = ctx, ctx.config.evaluate, renderer
        self._languages = RunLanguages(ctx.config.languages)
        self._trained_on = set[str]().union(
            *(self._data_of(source) for source in (*ctx.config.prompts.sources, *ctx.config.pairs.sources))
        )
        self._rows_in: dict[str, Counter[str]] = defaultdict(Counter)
        self.drops: list[Drop] = []
        training = training_rows(ctx)
        limit = self._config.pairs_per_language
        held_out = self._sample(self._disjoint(self._pairs(), training), limit)
        authored = list(self._disjoint(self._authored(), training))
        self.pairs = [pair for row in [*held_out, *authored] if (pair := self._tokenised(row))]
        before = len(self.drops)
        asked = list(self._disjoint(self._prompt_set() if self._config.prompts else self._prompts(), training))
        if self._config.prompts:
            self._tell_lost(before)
        first = preferred([row.asked for row in asked]) if preferred else ()
        self.prompts = [row.asked for row in self._sample(asked, self._config.prompts_per_language, False, first)]

    @property
    def splits(self) -> list[str]:
        """The splits pairs come from."""
        return [*self._config.splits, *([AUTHORED] if self._config.authored else [])]

    def came_in(self, unit: str, languages: Iterable[str]) -> None:
        """Count rows of another unit, one language a row."""
        self._rows_in[unit].update(languages)

    def tallies(self, later: list[Drop]) -> list[Tally]:
        """The account, with what was dropped `later`, while measuring."""
        drops = [*self.drops, *later]
        return [
            entry for unit, languages in self._rows_in.items() for entry in tally(unit, languages.elements(), drops)
        ]

    def _pairs(self) -> Iterator[_Candidate]:
        frame = self._ctx.scan("pairs:0").filter(pl.col("split").is_in(self._config.splits))
        columns = ["pair_id", "prompt_id", "group_id", "language", "split", "prompt", "chosen", "rejected"]
        for row in frame.select(columns).collect().iter_rows(named=True):
            yield _Candidate("pair", row.pop("pair_id"), **row)

    def _prompts(self) -> Iterator[_Candidate]:
        """From the prompts table; imported pairs have none, then their prompts, each once."""
        table, messages = ("prompts", "messages") if self._ctx.inputs.get("prompts") else ("pairs:0", "prompt")
        frame = self._ctx.scan(table).filter(pl.col("split").is_in(self._config.splits))
        frame = frame.select("prompt_id", "group_id", "language", "split", pl.col(messages).alias("prompt"))
        frame = frame.unique("prompt_id", keep="first", maintain_order=True)
        for row in frame.collect().iter_rows(named=True):
            yield _Candidate("prompt", row["prompt_id"], **row, chosen=[], rejected=[])

    def _prompt_set(self) -> Iterator[_Candidate]:
        """From `evaluate.prompts`: split test, or unseen. A prompt that comes twice is asked once."""
        known: set[str] = set()
        for source in self._config.prompts:
            for batch in batches_of(source, self._languages.codes):
                for number, cells in enumerate(batch.rows, start=batch.start):
                    try:
                        row = self._prompt_of(source, batch.language, cells)
                        if row.row_id in known:
                            raise BadRow("duplicate", "an earlier prompt of evaluate.prompts has the same text")
                    except BadRow as bad:
                        self._unread(f"{batch.source}:{number}", cells, bad)
                        continue
                    known.add(row.row_id)
                    yield row

    def _prompt_of(self, source: PromptSetSource, language: str | None, cells: dict[str, Any]) -> _Candidate:
        fields = source.fields
        label = self._languages.label(_cell(cells, fields.language), language)
        messages = read_prompt(cells.get(fields.prompt), _cell(cells, fields.system))
        (guess,) = self._languages.guess([spoken(messages)])
        code = self._languages.settle(label, [Spoken(spoken(messages), guess)])
        prompt_id = content_id(code, messages)
        split = "unseen" if code in self._ctx.config.languages.unseen else "test"
        group = group_of(_cell(cells, fields.group_id), prompt_id)
        return _Candidate(
            "prompt", prompt_id, prompt_id, group, code, split, messages, [], [], self._is_foreign(source)
        )

    def _is_foreign(self, source: Source) -> bool:
        return self._trained_on.isdisjoint(self._data_of(source))

    def _data_of(self, source: Source) -> set[str]:
        """What a source reads, however its path is spelt: files, or a data set of the hub. A training file that is gone goes by its path."""
        with suppress(UserError):
            if files := local_files(source, self._languages.codes):
                return {str(file.path.resolve()) for file in files}
        return {source.path}

    def _tell_lost(self, before: int) -> None:
        """What of `evaluate.prompts` is not asked, and why. before: drops that there were before it was read."""
        lost = Counter(drop.reason for drop in self.drops[before:])
        if lost:
            reasons = ", ".join(f"{reason} {count}" for reason, count in lost.most_common())
            self._ctx.progress.note(
                f"evaluate.prompts: {lost.total():,} rows are not asked ({reasons}; dropped/evaluation)"
            )

    def _unread(self, row_id: str, cells: dict[str, Any], bad: BadRow) -> None:
        self._rows_in["row"][UNKNOWN] += 1
        self.drops.append(Drop("row", row_id, UNKNOWN, bad.reason, bad.detail, text=excerpt(cells)))

    def _authored(self) -> Iterator[_Candidate]:
        for source in (one.pairs for one in self._config.authored):
            for batch in batches_of(source, self._languages.codes):
                for number, cells in enumerate(batch.rows, start=batch.start):
                    found = list(pairs_of(cells, source, self._renderer.longest_text))
                    for place, pair in enumerate(found, start=1):
                        row_id = f"{batch.source}:{number}" + (f"#{place}" if len(found) > 1 else "")
                        try:
                            yield self._authored_row(row_id, cells, pair, source, batch.language)
                        except BadRow as bad:
                            self._unread(row_id, cells, bad)

    def _authored_row(
        self,
        row_id: str,
        cells: dict[str, Any],
        pair: RawPair | BadRow,
        source: PairSource,
        source_language: str | None,
    ) -> _Candidate:
        fields = source.fields
        label = self._languages.label(_cell(cells, fields.language), source_language)
        if label is None:
            raise BadRow("no_language", "authored pairs need a language column or the source's language")
        if isinstance(pair, BadRow):
            raise pair
        policy = self._ctx.config.text.thoughts
        chosen, rejected = self._renderer.thoughts.targets(pair.chosen, pair.rejected, policy)
        texts = [spoken(pair.prompt), pair.chosen]
        language = self._languages.settle(label, [Spoken(text, Guess(UNKNOWN, 0.0, 0.0)) for text in texts])
        prompt_id = content_id(language, pair.prompt)
        return _Candidate(
            "pair",
            row_id,
            prompt_id,
            group_of(_cell(cells, fields.group_id), prompt_id),
            language,
            AUTHORED,
            pair.prompt,
            [{"role": "assistant", "content": chosen}],
            [{"role": "assistant", "content": rejected}],
        )

    def _disjoint(self, rows: Iterator[_Candidate], training: TrainingRows) -> Iterator[_Candidate]:
        for row in rows:
            self._rows_in[row.unit][row.language] += 1
            reason = training.overlap(row.prompt_id, None if row.foreign else row.group_id, row.prompt)
            if reason is None:
                yield row
            else:
                self._drop(row, reason, f"split {row.split}, group {row.group_id}")

    def _sample(
        self, rows: Iterable[_Candidate], limit: int, per_split: bool = True, first: Container[str] = ()
    ) -> list[_Candidate]:
        """The same rows in every round: in the order of a hash of run seed and row id, the first `limit`; before them those in `first`."""
        cells: dict[tuple[str, str], list[_Candidate]] = defaultdict(list)
        for row in rows:
            cells[row.language, row.split if per_split else ""].append(row)
        kept = []
        for _, found in sorted(cells.items()):
            found.sort(
                key=lambda row: (row.row_id not in first, seed_for(self._ctx.config.seed, "evaluate", row.row_id))
            )
            kept += found[:limit]
            for row in found[limit:]:
                self._drop(row, "not_sampled", f"more than {limit}")
        return kept

    def _tokenised(self, row: _Candidate) -> HeldOutPair | None:
        try:
            ids = self._renderer.pair_ids(row.prompt, row.chosen, row.rejected)
        except RenderError as error:
            self._drop(row, "cannot_render", str(error), failed=True)
            return None
        tokens, longest = len(ids.prompt) + max(len(ids.chosen), len(ids.rejected)), self._ctx.config.text.max_length
        if tokens > longest:
            self._drop(row, "too_long", f"{tokens} tokens > text.max_length {longest}")
            return None
        return HeldOutPair(row.row_id, row.group_id, row.language, row.split, row.prompt, ids)

    def _drop(self, row: _Candidate, reason: str, detail: str, failed: bool = False) -> None:
        self.drops.append(Drop(row.unit, row.row_id, row.language, reason, detail, failed))


def _cell(cells: dict[str, Any], column: str | None) -> Any:
    return cells.get(column) if column else None
