"""From cells to prompts in their language, a batch at a time: every row by itself, so that cores share the batches."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread

from schemas.config import RunConfig
from schemas.config.sources import PromptFields
from schemas.errors import UserError
from schemas.languages import UNKNOWN
from stages.cells import cell_id, word
from stages.children import Child, ChildDied, start_child
from stages.contract import Drop
from stages.prompts.duplicates import TextKey, keys_of
from stages.sources import Batch, excerpt
from stages.text.assign import Label, RunLanguages, Spoken
from stages.text.messages import BadRow, Messages, read_prompt, spoken, too_long

_FEW = 4
"""Batches that are read in this process: for less, others would cost more to start than they save."""
_MOST = 16  # processes
_AHEAD = 2
"""Batches that a process has: while this one compares what was read, each has the next one already."""
_RAW = 4
"""Characters of a cell to one that is left of it, at most: spaces and control characters go, accents are composed."""


@dataclass
class PromptRow:
    """A row on its way through the rules. group, split: what it says itself, None if nothing. key: its text, to compare."""

    row_id: str
    number: int
    group: str | None
    split: str | None
    messages: Messages
    label: Label | None
    language: str = UNKNOWN
    confidence: float = 0.0
    key: TextKey | None = None


@dataclass(frozen=True)
class Read:
    """A batch that was read: what is left of it, in order, and what went, of `count` rows.

    overruled: rows that keep a label which the identifier does not confirm. assumed: rows that are in the run's one language because
    nothing says another.
    """

    source: int
    batch_source: str
    split: str | None
    count: int
    rows: list[PromptRow]
    drops: list[Drop]
    notes: list[str] = field(default_factory=list)
    overruled: int = 0
    assumed: int = 0


class Reader:
    """Reads batches of prompts: parses, bounds, identifies; drops with the reasons that `Prompts` lists, duplicates aside."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.languages = RunLanguages(config.languages)

    def read(self, source: int, batch: Batch) -> Read:
        """The batch of `prompts.sources[source]`."""
        fields = self._config.prompts.sources[source].fields
        overruled, assumed = self.languages.overruled, self.languages.assumed
        drops: list[Drop] = []
        parsed: list[tuple[PromptRow, dict[str, object]]] = []
        for number, cells in enumerate(batch.rows, start=batch.start):
            row_id, label = f"{batch.source}:{number}", None
            try:
                label = self.languages.label(_cell(cells, fields.language), batch.language)
                group, split = cell_id(_cell(cells, fields.group_id)), word(_cell(cells, fields.split))
                parsed.append((PromptRow(row_id, number, group, split, self._messages(cells, fields), label), cells))
            except BadRow as bad:
                drops.append(_drop(row_id, label[0] if label else UNKNOWN, bad, cells))
        texts = [spoken(row.messages) for row, _ in parsed]
        kept: list[PromptRow] = []
        full: list[str] = []
        said: list[str] = []
        for (row, cells), text, found in zip(parsed, texts, self.languages.guess(texts), strict=True):
            row.confidence = found.confidence
            try:
                row.language = self.languages.settle(row.label, [Spoken(text, found)])
            except BadRow as bad:
                drops.append(_drop(row.row_id, row.label[0] if row.label else UNKNOWN, bad, cells))
                continue
            kept.append(row)
            said.append(text)
            full.append("\n".join(message["content"] for message in row.messages))
        near = self._config.prompts.near_duplicate_threshold < 1
        for row, key in zip(kept, keys_of(said, full, near), strict=True):
            row.key = key
        return Read(
            source,
            batch.source,
            batch.split,
            len(batch.rows),
            kept,
            drops,
            batch.notes,
            overruled=self.languages.overruled - overruled,
            assumed=self.languages.assumed - assumed,
        )

    def _messages(self, cells: dict[str, object], fields: PromptFields) -> Messages:
        config, prompt = self._config.prompts, cells.get(fields.prompt)
        if beyond := too_long(prompt, _RAW * config.max_chars):
            raise BadRow("too_long", f"{beyond} characters")
        messages = read_prompt(prompt, _cell(cells, fields.system))
        characters = len(spoken(messages))
        if characters < config.min_chars:
            raise BadRow("too_short", f"{characters} characters")
        if characters > config.max_chars:
            raise BadRow("too_long", f"{characters} characters")
        return messages


def read_all(reader: Reader, config: RunConfig, batches: Iterator[tuple[int, Batch]]) -> Generator[Read, None, None]:
    """Every batch (source, batch), read, in order: in this process if they are few, else in one process a core."""
    first = list(islice(batches, _FEW))
    cores = min(_MOST, len(os.sched_getaffinity(0)))
    if len(first) < _FEW or cores == 1:
        for source, batch in chain(first, batches):
            yield reader.read(source, batch)
        return
    children = [start_child(_serve, (config,), f"congrad-prompts-{n}") for n in range(cores)]
    try:
        waiting: deque[Child] = deque()  # one for each batch, in the order of the batches
        for number, (source, batch) in enumerate(chain(first, batches)):
            read = waiting.popleft().receive() if len(waiting) == _AHEAD * cores else None
            child = children[number % cores]
            child.send((source, batch))
            waiting.append(child)
            if read is not None:
                yield read
        while waiting:
            yield waiting.popleft().receive()
    except ChildDied as error:
        if not error.killed:
            raise
        raise UserError(
            f"a process that read prompts died: {error.cause}", where="prompts", fix="Free some memory and start again."
        ) from error
    finally:
        for child in children:
            child.kill()


def _serve(connection: Connection, config: RunConfig) -> None:
    """What a child does: reads the batches it is sent, one after another. A thread takes them off the pipe, or both ends would wait to be
    heard where a batch and an answer are larger than the pipe."""
    sent: SimpleQueue[tuple[int, Batch] | None] = SimpleQueue()
    Thread(target=_take, args=(connection, sent), daemon=True).start()
    reader = Reader(config)
    while (batch := sent.get()) is not None:
        connection.send(reader.read(*batch))


def _take(connection: Connection, sent: SimpleQueue[tuple[int, Batch] | None]) -> None:
    try:
        while True:
            sent.put(connection.recv())
    except (EOFError, OSError):  # nobody is there any more
        sent.put(None)


def _cell(cells: dict[str, object], column: str | None) -> object:
    return cells.get(column) if column else None


def _drop(row_id: str, language: str, bad: BadRow, cells: dict[str, object]) -> Drop:
    return Drop("row", row_id, language, bad.reason, bad.detail, text=excerpt(cells))
