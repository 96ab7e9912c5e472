"""Shown text cannot steer, hide, reorder or break what shows it."""

from __future__ import annotations

import pytest
from hostile import NASTY, STEERING
from hypothesis import given
from hypothesis import strategies as st

from stages.text.markdown import escape
from stages.text.messages import clean
from stages.text.visible import visible, without_hidden

ANY = st.text(st.characters(exclude_categories=()), max_size=60)


@pytest.mark.parametrize("name", NASTY)
def test_nothing_that_steers_is_shown(name: str) -> None:
    for shown in (visible(NASTY[name]), without_hidden(NASTY[name]), escape(NASTY[name])):
        assert not STEERING & set(shown)
        shown.encode("utf-8")
        assert visible(shown) == shown


@given(ANY)
def test_any_text_can_be_shown_and_written(text: str) -> None:
    assert not STEERING & set(visible(text))
    visible(text).encode("utf-8")
    assert set(without_hidden(text)) <= set(text)


@pytest.mark.parametrize("name", NASTY)
def test_markdown_of_any_text_is_that_text(name: str) -> None:
    from markdown_it import MarkdownIt

    shown = escape(NASTY[name][:5000])
    assert "\n" not in shown
    renderer = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table")
    tokens = renderer.parse(f"| {shown} | b |\n|---|---|\n| {shown} | c |\n\nx {shown}\n")
    kinds = {child.type for token in tokens for child in [token, *(token.children or [])]}
    assert kinds <= {"table_open", "table_close", "thead_open", "thead_close", "tbody_open", "tbody_close", "tr_open",
                     "tr_close", "th_open", "th_close", "td_open", "td_close", "paragraph_open", "paragraph_close",
                     "inline", "text", "text_special", "softbreak"}, kinds  # fmt: skip
    assert sum(token.type in ("th_open", "td_open") for token in tokens) == 4


@pytest.mark.parametrize(
    "text",
    ["google/gemma-2-2b-it", "0.01", "-0.5", "snake_case_name", "demo, round 0 (en)", "embedded:x-0.5b", "a = b!"],
)
def test_ordinary_names_and_figures_are_written_as_they_are(text: str) -> None:
    assert escape(text) == text


@given(st.text(max_size=40))
def test_markdown_of_any_text_shows_it_and_holds_no_backslash(text: str) -> None:
    from markdown_it import MarkdownIt

    wanted = " ".join(visible(text).split())
    assert "\\" not in escape(text)
    (block,) = MarkdownIt("commonmark", {"html": True}).parseInline(f"x {escape(text)}")
    assert "".join(child.content for child in block.children or []) == f"x {wanted}"


@pytest.mark.parametrize("name", NASTY)
def test_stored_text_is_clean(name: str) -> None:
    cleaned = clean(NASTY[name])
    cleaned.encode("utf-8")
    assert clean(cleaned) == cleaned and "\x00" not in cleaned and "\x1b" not in cleaned
