"""Sources of every kind, opened with the columns that their rows are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from schemas.config.evaluation import AnswerSource, PromptSetSource
from schemas.config.sft import ConversationFields, ConversationSource
from schemas.config.sources import AuthoredSource, PairSource, PromptSource, Source
from schemas.errors import UserError
from stages.layout import missing_column
from stages.pairs.read import pair_batches
from stages.sources import Batch, columns_of, prompt_batches, read_rows

_OF_CONVERSATIONS = ("messages", "prompt", "completion", "language")


def batches_of(source: Source, codes: Sequence[str], most: int | None = None) -> Iterator[Batch]:
    """Batches of a source. Raises UserError, before a row is given, for a file of no use; most: local files, at most, that are read and
    looked at; None: all."""
    match source:
        case PairSource():
            return pair_batches(source, codes, most)
        case AuthoredSource():
            return pair_batches(source.pairs, codes, most)
        case ConversationSource():
            required, optional = columns_of(source.fields, _OF_CONVERSATIONS)
            fields, singles = source.fields, (source.fields.prompt, source.fields.completion)
            return read_rows(
                source, codes, required, optional, lambda b: _check_conversation(b, fields), singles=singles, most=most
            )
        case AnswerSource():
            absent_ok = ("language",) if source.generator else ("language", "generator")
            return read_rows(source, codes, *columns_of(source.fields, absent_ok), most=most)
        case PromptSource() | PromptSetSource():
            return prompt_batches(source, codes, most)
    raise TypeError(f"no kind of source: {type(source).__name__}")


def _check_conversation(batch: Batch, fields: ConversationFields) -> None:
    if fields.messages in batch.columns:
        return
    if fields.completion in batch.columns:
        if fields.prompt not in batch.columns:
            raise missing_column(batch.source, fields.prompt, batch.columns)
        return
    error = missing_column(batch.source, fields.messages, batch.columns)
    raise UserError(
        f"{error.what}; nor is there {fields.completion!r}, so that no row has a conversation",
        where=error.where,
        fix=error.fix,
    )
