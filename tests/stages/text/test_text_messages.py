from __future__ import annotations

import unicodedata
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.text.forms import conversation
from stages.text.messages import BadRow, clean, comparable, is_blank, read_messages, read_prompt, same_text, unpadded

ANY = st.text(st.characters(exclude_categories=()), max_size=60)


@settings(max_examples=200, deadline=None)
@given(ANY)
def test_clean_text_is_storable_stable_and_without_control_characters(text: str) -> None:
    cleaned = clean(text)
    assert cleaned.encode("utf-8").decode() == cleaned
    assert clean(cleaned) == cleaned == unpadded(cleaned)
    assert cleaned.strip() == clean(text.strip()).strip()
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in cleaned)


@settings(max_examples=200, deadline=None)
@given(ANY)
def test_comparable_is_blind_to_case_and_spacing(text: str) -> None:
    assert comparable(f"  {text}\n\t") == comparable(text)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("    y = x + 0\n    return y", "    y = x + 0\n    return y"),
        ("\n \n\ty = 1\n\treturn y\n\n", "\ty = 1\n\treturn y"),
        ("\r\n    code\r\n\r\nand text", "    code\n\nand text"),
        (" \t- one\n- two", " \t- one\n- two"),
        (" Hi.\n\nHow are you?", "Hi.\n\nHow are you?"),
        ("\n\n Hi.\nHow?", "Hi.\nHow?"),
        ("    return y  \n", "return y"),
        ("\u3000\u3000段落\n\u3000\u3000下一段", "\u3000\u3000段落\n\u3000\u3000下一段"),
        ("\n\u3000段落\n\u3000次の段落\u3000\n", "\u3000段落\n\u3000次の段落"),
        ("\u3000\u3000段落\u3000", "段落"),
        ("    \u00a0y\n  z", "y\n  z"),
    ],
)
def test_what_indents_the_first_of_several_lines_stays(text: str, kept: str) -> None:
    assert read_messages(text, "assistant") == [{"role": "assistant", "content": kept}]
    assert read_prompt([{"role": "user", "content": text}])[0]["content"] == kept


@pytest.mark.parametrize(
    "text", ["\u200f", "\u3164\u2800", " \u2066\u2069 ", "\u200b\u00a0\u200d", "\u115f\u1160\uffa0", "\u202a\n\u202c"]
)
def test_a_text_of_which_a_reader_sees_nothing_is_empty(text: str) -> None:
    assert is_blank(text)
    with pytest.raises(BadRow, match="empty"):
        read_messages(text, "assistant")


def test_two_texts_are_one_where_a_reader_sees_no_difference() -> None:
    for one, other in (
        ("Yes\u200b.", "Yes."),
        ("\u200fشكرا", "شكرا"),
        ("e\u0301", "é"),
        ("a\u200db", "ab"),
        ("é \u2800", "é"),
    ):
        assert same_text(one, other)
        long = "word " * 40
        assert same_text(f"{long}{other}", f"{long}{one}") and not same_text(f"{long}{one}", f"{long}{other}x")
    for one, other in (("yes", "YES"), ("é\n  b", "é\n b"), ("می‌خواهم", "میخواهم"), ("👩‍💻", "👩💻"), ("é", "è")):
        assert not same_text(one, other)


def test_joiners_and_direction_marks_of_real_scripts_survive() -> None:
    text = "می‌خواهم \u200fשלום क्‍ष"
    assert clean(text) == text


def test_a_system_column_does_not_replace_a_system_message() -> None:
    assert read_prompt("hi", " be kind ")[0] == {"role": "system", "content": "be kind"}
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hi"}]
    assert read_prompt(own, "be kind") == own
    for nothing in ("  ", "nan", " None ", "null", "<NA>", "NULL", "none", "N/A", "\\N", "-"):
        assert read_prompt("hi", nothing) == [{"role": "user", "content": "hi"}]


def test_an_empty_system_message_is_none() -> None:
    said = [{"role": "system", "content": "\u200b "}, {"role": "user", "content": "hi"}]
    assert read_prompt(said, "be kind") == [{"role": "system", "content": "be kind"}, said[1]]
    with pytest.raises(BadRow, match="empty"):
        read_prompt(said[:1])


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_an_empty_message_inside_a_conversation_is_named(role: str) -> None:
    said = [{"role": "user", "content": "hi"}, {"role": role, "content": " "}, {"role": "user", "content": "there?"}]
    with pytest.raises(BadRow, match=f"message 2 of 3, the {role}'s, is empty"):
        read_prompt(said)


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize("system", ["system", "system_prompt"])
def test_a_system_message_beside_messages_in_one_cell_is_theirs(key: str, system: str) -> None:
    notes: list[str] = []
    own = [{"from": "system", "value": "mine"}, {"from": "human", "value": "hi"}]
    hi, kind = {"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}
    assert conversation({key: own[1:], system: "be kind", "tools": [{"name": "add"}]}, notes.append) == [kind, hi]
    assert conversation({key: own, system: "be kind"}, print) == [{**kind, "content": "mine"}, hi]
    empty = {key: [{"from": "system", "value": ""}, *own[1:]], system: "be kind"}
    assert read_prompt(conversation(empty, print)) == [kind, hi]
    for nothing in ("", "null", None):
        assert conversation({key: own[1:], system: nothing}, print) == [hi]
    assert "tools beside messages are not read" in notes


def test_a_call_of_a_function_in_the_place_of_content_is_a_tool_call() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}
    with pytest.raises(BadRow, match="tool_calls"):
        conversation([{"role": "user", "content": "hi"}, call], print)
    assert conversation([{**call, "content": "ok", "function_call": None}], print)[0]["content"] == "ok"


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (7.0, "7"), (3.5, "3.5"), (0, "0"), (-2, "-2"), (1e20, "1e+20")])
def test_a_number_is_the_text_that_people_write_for_it(value: float, text: str) -> None:
    """The answer 7 is a number in JSON; pandas makes 7.0 of it."""
    assert read_prompt(value) == [{"role": "user", "content": text}]
    assert read_prompt([{"role": "user", "content": value}]) == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("value", "text"),
    [("7.00", "7"), ("7.50", "7.5"), ("-0.250", "-0.25"), ("100", "100"), ("1E+3", "1000"), ("0.00", "0")],
)
def test_a_decimal_is_the_number_it_is(value: str, text: str) -> None:
    assert read_prompt(Decimal(value))[0]["content"] == text
    with pytest.raises(BadRow, match="not_text"):
        read_prompt(Decimal("nan"))


@pytest.mark.parametrize("between", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\r", "\r\n"])
def test_control_characters_that_part_words_are_line_breaks(between: str) -> None:
    assert clean(f"{between}one{between}two\x00{between}") == "one\ntwo"


@pytest.mark.parametrize("text", ["don\x92t", "It\x80\x99s", "So\x85 it\x92s"])
def test_a_text_with_the_leftovers_of_another_encoding_is_dropped(text: str) -> None:
    for value in (text, [{"role": "user", "content": text}]):
        with pytest.raises(BadRow, match=r"not_text.*U\+00[89]\w in it"):
            read_prompt(value)
    with pytest.raises(BadRow, match="not_text"):
        read_prompt("hi", text)


@pytest.mark.parametrize("value", [{"role": "user"}, [["user", "hi"]], b"hi", True, float("inf")])
def test_what_is_no_conversation_is_not_text(value: object) -> None:
    with pytest.raises(BadRow, match="not_text"):
        read_prompt(value)
