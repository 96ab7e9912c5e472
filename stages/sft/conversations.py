"""From the configured sources to conversations with token ids, every row accounted for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pyarrow as pa

from schemas.config.model import TextConfig
from schemas.config.sft import ConversationFields
from schemas.errors import UserError
from schemas.ids import content_id
from schemas.languages import UNKNOWN, says_none, standard
from schemas.tables import TABLES
from stages.cells import word
from stages.contract import Context, Drop, Stopped
from stages.empty import why_dropped
from stages.source_kinds import batches_of
from stages.sources import Batch, excerpt
from stages.text.forms import LEFT_OUT, in_turn
from stages.text.messages import BadRow, Messages, read_messages, read_prompt, too_long, with_system
from stages.text.render import Renderer, RenderError, check_thoughts
from stages.text.thoughts import Policy

SCHEMA = TABLES["conversations"].schema
_ROWS = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
IGNORED = -100
"""Label of a token that the loss leaves out."""


@dataclass
class Conversations:
    """What was read. rows: (input_ids, labels) as the trainer takes them; table: `conversations`, in the same order.

    hashes: of ids and labels; languages: of every row that came in; answers: learnt, only context because the template rewrites them, and
    left out because the data says so. in_a_row: conversations with an answer right after another; in_turn: those that are lists of texts.
    """

    rows: pa.Table = field(default_factory=_ROWS.empty_table)
    table: pa.Table = field(default_factory=SCHEMA.empty_table)
    languages: list[str] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    broken_marks: int = 0
    in_a_row: int = 0
    in_turn: int = 0
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
        raise BadRow("no_conversation" if cells.get(fields.prompt) is None else "empty")
    if found[-1]["role"] != "assistant":
        raise BadRow("no_answer", f"the last message is the {found[-1]['role']}'s")
    roles = [message["role"] for message in found]
    if "user" not in roles[: roles.index("assistant")]:
        raise BadRow("no_user_turn", "an answer comes before any user turn")
    return with_system(found, system)


def load_conversations(ctx: Context, renderer: Renderer) -> Conversations:
    """Read, render and tokenise every row of `sft.sources`.

    Unit row. Dropped: reasons of `read_conversation`, too_long (text.max_length). Failed: cannot_render. Raises UserError for a
    source without the columns of a conversation, and when nothing is left; Stopped.
    """
    config, found = ctx.config, Conversations()
    codes = config.languages.codes
    check_thoughts(renderer, config.text.thoughts)
    readers = [(source, batches_of(source, codes)) for source in config.sft.sources]
    for source, batches in readers:
        for batch in batches:
            if ctx.stop():
                raise Stopped
            for note in batch.notes:
                ctx.progress.note(f"{batch.source}: {note}")
            _add(found, batch, source.fields, renderer, config.text)
            ctx.progress.advance(0, rows_read=float(len(found.languages)))
    if not len(found):
        raise UserError(
            f"no conversation is left to learn from: {len(found.languages)} rows in, " + why_dropped(found.drops, 0),
            where="sft.sources",
            fix="Give conversations that fit text.max_length and the chat template, or look at the sources' `fields`.",
        )
    return found


def _add(found: Conversations, batch: Batch, fields: ConversationFields, renderer: Renderer, text: TextConfig) -> None:
    ids: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for number, cells in enumerate(batch.rows, start=batch.start):
        label = cells.get(fields.language) if fields.language else None
        language, row_id = _code(word(label) or batch.language), f"{batch.source}:{number}"
        found.languages.append(language)
        said = cells.get(fields.messages)
        cells = {**cells, fields.messages: in_turn(said)}
        try:
            if beyond := too_long(list(cells.values()), renderer.longest_text):
                raise BadRow("too_long", f"{beyond:,} characters > {renderer.longest_text:,}")
            messages, broken = _learnt(read_conversation(cells, fields), renderer, text.thoughts)
            answers, left_out = sum(message["role"] == "assistant" for message in messages), _left_out(cells, fields)
            rendered = renderer.conversation_ids(messages, left_out)
            if not any(rendered.learnt):
                raise BadRow(
                    "left_out",
                    f"weight 0, train: false or the like on {len(left_out)} of {answers} answers, no other is learnt",
                )
            if len(rendered.ids) > text.max_length:
                raise BadRow("too_long", f"{len(rendered.ids)} tokens > {text.max_length}")
        except BadRow as bad:
            found.drops.append(Drop("row", row_id, language, bad.reason, bad.detail, text=excerpt(cells)))
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
        only = {"context_only": rendered.context_only, "left_out": len(left_out)}
        found.answers.update(learnt=answers - sum(only.values()), **only)
        roles = [message["role"] for message in messages]
        found.in_turn += cells[fields.messages] is not said
        found.in_a_row += any(one == other == "assistant" for one, other in pairwise(roles))
        found.broken_marks += broken
    found.rows = pa.concat_tables([found.rows, pa.Table.from_pylist(ids, schema=_ROWS)])
    found.table = pa.concat_tables([found.table, pa.Table.from_pylist(rows, schema=SCHEMA)])


def _left_out(cells: dict[str, Any], fields: ConversationFields) -> set[int]:
    """The answers of a row, counted from 0, that the data leaves out of what is learnt."""
    said = cells.get(fields.messages)
    parts = [said] if said is not None else [cells.get(fields.prompt), cells.get(fields.completion)]
    messages = [message for part in parts if isinstance(part, list) for message in part]
    answers = [message for message in messages if message.get("role") == "assistant"]
    return {place for place, answer in enumerate(answers) if answer.get(LEFT_OUT)}


def _learnt(messages: Messages, renderer: Renderer, policy: Policy) -> tuple[Messages, int]:
    """The messages with control marks broken and thoughts as the policy says, and how many marks were broken.

    Raises BadRow as `Thoughts.target` does, and tool_calls.
    """
    neutral, broken = [], 0
    for message in messages:
        if message["role"] == "assistant":
            target = renderer.thoughts.target(message["content"], policy)
            if renderer.calls_tools(target):
                raise BadRow("tool_calls", "written as text, in the model's own marks")
            content, count = renderer.neutral_answer(target)
        else:
            content, count = renderer.neutralise(message["content"])
        neutral.append({"role": message["role"], "content": content})
        broken += count
    return neutral, broken


def _code(label: Any) -> str:
    """A row's language as a BCP 47 code, und where the data says nothing that is one. Any language may be learnt from."""
    return (standard(label) if label and not says_none(label) else None) or UNKNOWN
