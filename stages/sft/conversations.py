"""From the configured sources to conversations with token ids, every row accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import langcodes
import pyarrow as pa

from schemas.config.sft import ConversationFields, ConversationSource
from schemas.errors import UserError
from schemas.ids import content_id
from schemas.tables import TABLES
from stages.contract import Context, Drop, Stopped
from stages.sources import Batch, columns_of, read_rows
from stages.text.language import UNKNOWN
from stages.text.messages import BadRow, Messages, clean, read_messages, read_prompt
from stages.text.render import Renderer, RenderError

SCHEMA = TABLES["conversations"].schema
_OPTIONAL = ("messages", "prompt", "completion", "language")
_ROWS = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
IGNORED = -100
"""Label of a token that the loss leaves out."""


@dataclass
class Conversations:
    """What was read. rows: (input_ids, labels) as the trainer takes them; table: `conversations`, in the same order.

    hashes: of ids and labels; languages: of every row that came in; answers: learnt and, because the template rewrites them, only context.
    """

    rows: pa.Table = field(default_factory=_ROWS.empty_table)
    table: pa.Table = field(default_factory=SCHEMA.empty_table)
    languages: list[str] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    broken_marks: int = 0
    hashes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.rows.num_rows

    @property
    def digest(self) -> str:
        """Content of ids, labels and order."""
        return content_id(self.hashes)


def read_conversation(cells: dict[str, Any], fields: ConversationFields) -> Messages:
    """Clean messages that end in an answer, from `messages`, or from `prompt` and `completion`.

    Raises BadRow: as read_messages and read_prompt do; no_conversation (neither is there), no_answer (the last message is not
    the assistant's), no_user_turn (no user turn before the first answer), several_answers (completion is more than one message).
    """
    system = cells.get(fields.system) if fields.system else None
    messages, completion = cells.get(fields.messages), cells.get(fields.completion)
    if messages is not None:
        found = read_messages(messages)
    elif completion is not None:
        found = read_prompt(cells.get(fields.prompt))
        answer = read_messages(completion, role="assistant")
        if len(answer) != 1:
            raise BadRow("several_answers", f"{len(answer)} messages in the completion")
        found = [*found, *answer]
    else:
        raise BadRow("no_conversation")
    if found[-1]["role"] != "assistant":
        raise BadRow("no_answer", f"the last message is the {found[-1]['role']}'s")
    roles = [message["role"] for message in found]
    if "user" not in roles[: roles.index("assistant")]:
        raise BadRow("no_user_turn", "an answer comes before any user turn")
    if any(not m["content"] for m in found if m["role"] == "assistant"):
        raise BadRow("empty", "an answer is empty")
    if system and roles[0] != "system" and (content := clean(str(system))):
        found.insert(0, {"role": "system", "content": content})
    return found


def load_conversations(ctx: Context, renderer: Renderer) -> Conversations:
    """Read, render and tokenise every row of `sft.sources`.

    Unit row. Dropped: reasons of `read_conversation`, too_long (text.max_length). Failed: cannot_render. Raises UserError for a
    source without the columns of a conversation, and when nothing is left; Stopped.
    """
    config, found = ctx.config, Conversations()
    codes = [*config.languages.seen, *config.languages.unseen]
    readers = [(source, _open(source, codes)) for source in config.sft.sources]
    for source, batches in readers:
        for batch in batches:
            if ctx.stop():
                raise Stopped
            _check_columns(batch, source.fields)
            _add(found, batch, source.fields, renderer, config.text.max_length)
            ctx.progress.advance(0, rows_read=float(len(found.languages)))
    if not len(found):
        reasons = Counter(drop.reason for drop in found.drops)
        raise UserError(
            f"no conversation is left to learn from: {len(found.languages)} rows in, "
            + ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())),
            where="sft.sources",
            fix="Give conversations that fit text.max_length and the chat template, or look at the sources' `fields`.",
        )
    return found


def _open(source: ConversationSource, codes: list[str]) -> Iterator[Batch]:
    required, optional = columns_of(source.fields, _OPTIONAL)
    return read_rows(source, codes, required, optional)


def _check_columns(batch: Batch, fields: ConversationFields) -> None:
    if batch.start == 0 and all(
        cells.get(fields.messages) is None and cells.get(fields.completion) is None for cells in batch.rows
    ):
        raise UserError(
            f"no row has a conversation: neither {fields.messages!r} nor {fields.prompt!r} and {fields.completion!r}",
            where=batch.source,
            fix="Set the source's `fields` (messages, or prompt and completion) to the names of your columns.",
        )


def _add(found: Conversations, batch: Batch, fields: ConversationFields, renderer: Renderer, longest: int) -> None:
    ids: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for number, cells in enumerate(batch.rows, start=batch.start):
        label = cells.get(fields.language) if fields.language else None
        language, row_id = _code(label or batch.language), f"{batch.source}:{number}"
        found.languages.append(language)
        try:
            messages, broken = _neutral(read_conversation(cells, fields), renderer)
            rendered = renderer.conversation_ids(messages)
            if len(rendered.ids) > longest:
                raise BadRow("too_long", f"{len(rendered.ids)} tokens > {longest}")
        except BadRow as bad:
            found.drops.append(Drop("row", row_id, language, bad.reason, bad.detail))
            continue
        except RenderError as error:
            found.drops.append(Drop("row", row_id, language, "cannot_render", str(error), failed=True))
            continue
        labels = [token if learn else IGNORED for token, learn in zip(rendered.ids, rendered.learnt, strict=True)]
        ids.append({"input_ids": rendered.ids, "labels": labels})
        found.hashes.append(content_id(rendered.ids, labels))
        rows.append(
            {
                "conversation_id": content_id(language, messages),
                "language": language,
                "messages": messages,
                "n_tokens": len(rendered.ids),
                "n_learnt": sum(rendered.learnt),
                "source": batch.source,
                "source_row": number,
            }
        )
        answers = sum(message["role"] == "assistant" for message in messages)
        found.answers.update(learnt=answers - rendered.context_only, context_only=rendered.context_only)
        found.broken_marks += broken
    found.rows = pa.concat_tables([found.rows, pa.Table.from_pylist(ids, schema=_ROWS)])
    found.table = pa.concat_tables([found.table, pa.Table.from_pylist(rows, schema=SCHEMA)])


def _neutral(messages: Messages, renderer: Renderer) -> tuple[Messages, int]:
    """The messages with control marks broken, and how many were."""
    neutral, broken = [], 0
    for message in messages:
        content, count = renderer.neutralise(message["content"])
        neutral.append({"role": message["role"], "content": content})
        broken += count
    return neutral, broken


def _code(label: Any) -> str:
    """A row's language as a BCP 47 code, und where the data says nothing that is one. Any language may be learnt from."""
    code = "" if label is None else str(label).strip()
    return langcodes.standardize_tag(code) if code and langcodes.tag_is_valid(code) else UNKNOWN
