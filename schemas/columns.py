"""What tables are made of: columns that carry their meaning, and those that several tables share."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))
COSINES = pa.list_(pa.struct([pa.field("language", pa.string()), pa.field("cosine", pa.float32())]))


@dataclass(frozen=True)
class Table:
    """A named table: what a row is, and its Arrow schema (column meanings in the field metadata)."""

    name: str
    row: str
    schema: pa.Schema


def column(name: str, type_: pa.DataType, meaning: str, nullable: bool = False) -> pa.Field:
    """A column that carries its meaning."""
    return pa.field(name, type_, nullable=nullable, metadata={"meaning": meaning})


PROMPT_ID = column("prompt_id", pa.string(), "content hash of language and messages")
GROUP = column("group_id", pa.string(), "translation group: the same task in every language")
LANGUAGE = column("language", pa.string(), "language of the prompt, BCP 47")
SPLIT = column("split", pa.string(), "train | dev | test | unseen")
PAIR_ID = column(
    "pair_id", pa.string(), "content hash of prompt, chosen and rejected, and of the criterion if there is one"
)
ROUND = column("round", pa.int32(), "self-rewarding round that made the row, from 0")
CRITERION = column("criterion", pa.string(), "the criterion judged by (judge.criteria); null without criteria", True)
PAIR_BODY = [
    column("prompt", MESSAGES, "messages ending in a user turn"),
    column("chosen", MESSAGES, "the preferred answer, one assistant message"),
    column("rejected", MESSAGES, "the other answer, one assistant message"),
]
