"""Fuzzing: how many cases, what values, and how outcomes are counted.

HYPOTHESIS_PROFILE=long runs thousands of cases (`make fuzz`); otherwise a few seconds a test.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from hostile import NASTY
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from schemas.errors import UserError

T = TypeVar("T")

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
OUTCOMES: Counter[str] = Counter()
"""What happened to the cases of this session: shown at its end."""

SHORT_NASTY = [text for name, text in NASTY.items() if len(text) < 2000]
TEXT = st.one_of(st.sampled_from(SHORT_NASTY), st.text(st.characters(exclude_categories=()), max_size=30))
NUMBER = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63), 2**64, 10**50, 10**4299]),
    st.floats(),
)
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=8,
)


def cases(short: int, long: int) -> Any:
    """Settings of a fuzz test: `short` examples in CI, `long` in the long form. A hang ends with pytest's timeout."""
    return settings(
        max_examples=long if LONG else short,
        deadline=None,
        derandomize=not LONG,
        suppress_health_check=list(HealthCheck),
    )


def outcome_of(kind: str, run: Callable[[], T]) -> T | UserError:
    """The result, or the clear error; anything else raised is a failed test. Both are counted."""
    OUTCOMES[f"{kind}: cases"] += 1
    try:
        result = run()
    except UserError as error:
        OUTCOMES[f"{kind}: refused with a clear error"] += 1
        message = str(error)
        assert message.strip() and len(message) < 4000, f"an error of {len(message)} characters"
        assert len(message.splitlines()) <= 12
        return error
    OUTCOMES[f"{kind}: accepted"] += 1
    return result


PART = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["text", "image_url", "thinking", None]), "text": VALUE}
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool", "User", "", None, 7]),
        "content": st.one_of(TEXT, TEXT, VALUE, st.lists(PART, max_size=3)),
        "from": st.sampled_from(["human", "gpt", "nobody", 0]),
        "value": st.one_of(TEXT, VALUE),
        "reasoning_content": VALUE,
        "tool_calls": VALUE,
    },
)
CONVERSATION = st.one_of(
    st.lists(MESSAGE, max_size=4),
    MESSAGE,
    st.lists(MESSAGE, max_size=3).map(lambda messages: json.dumps(messages, default=str)),
    st.lists(MESSAGE, max_size=3).map(lambda messages: repr(messages)[: 500 if len(repr(messages)) % 2 else 30]),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=3)}),
    st.lists(st.tuples(st.sampled_from(["Human", "Assistant", "### Human", "System"]), TEXT), max_size=4).map(
        lambda turns: "".join(f"\n\n{name}: {text}" for name, text in turns)
    ),
    TEXT.map(lambda text: f"<think>\n{text}\n</think>\n\n{text}"),
)
"""A conversation in any form that is known, or nearly."""
LANGUAGE = st.one_of(
    st.sampled_from(["en", "de", "en-US", "EN", "und", "", "xx", "zh", "e" * 10_000, "en-" + "x-" * 5000, "en\x00"]),
    VALUE,
)


def file_bytes(kind: str, rows: list[dict[str, Any]], style: int) -> tuple[bytes, list[dict[str, Any]] | None]:
    """The rows as a JSONL, CSV or Parquet file, and the rows a right reader finds in it (None: not to be said).

    style: picks encoding, byte order mark, line ends and escapes.
    """
    if kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=style % 2 == 0) for row in rows]
        data = ("\r\n" if style % 3 == 1 else "\n").join(lines).encode("utf-8", "surrogatepass")
        written: list[dict[str, Any]] | None = rows
    elif kind == "csv":
        out = io.StringIO(newline="")
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.writer(out, quoting=csv.QUOTE_ALL if style % 2 else csv.QUOTE_MINIMAL)
        writer.writerow(columns)
        for row in rows:
            writer.writerow(["" if row.get(c) is None else _text(row[c]) for c in columns])
        data, written = out.getvalue().encode("utf-8", "surrogatepass"), None
    else:
        table = pa.table({c: _column([row.get(c) for row in rows]) for c in dict.fromkeys(c for r in rows for c in r)})
        sink = io.BytesIO()
        pq.write_table(table, sink)
        return sink.getvalue(), table.to_pylist()
    if style % 7 == 3:
        data = b"\xef\xbb\xbf" + data
    if style % 11 == 5:
        data, written = (
            data.decode("utf-8", "replace").encode(["utf-16", "latin-1", "cp1251"][style % 3], "replace"),
            None,
        )
    return data, written


def scribble(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes put in, cut out or cut off."""
    for _ in range(draw(st.integers(1, 3))):
        at, cut = draw(st.integers(0, len(data))), draw(st.integers(0, 20))
        data = data[:at] + draw(st.binary(max_size=6)) + data[at + cut :]
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 4)) == 0 else data


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _column(values: list[Any]) -> pa.Array:
    """As Arrow takes it, otherwise as text."""
    try:
        array = pa.array(values)
        pq.write_table(pa.table({"a": array}), io.BytesIO())
        return array
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        texts = [None if value is None else _text(value).encode("utf-8", "replace").decode() for value in values]
        return pa.array(texts, pa.string())
