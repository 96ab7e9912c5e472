"""Control marks in user text: made harmless, so that data never becomes template structure (docs/methods.md section 0)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_MARK_IN_TEMPLATE = re.compile(r"<\|[^|<>\s]{1,60}\|>|\[/?[A-Z_]{2,40}\]|<</?[A-Z]{2,40}>>")
_LOOKS_LIKE_ONE = re.compile(r"[<>\[\]|{}｜▁]")


def control_marks(tokenizer: Any, template: str) -> tuple[list[str], frozenset[int]]:
    """Strings that must not reach the model out of user text, and the ids of those that are tokens.

    They are the tokenizer's special tokens, added tokens that the chat template mentions (<think>, <tool_call>),
    and what looks like a mark in the template itself ([INST], <|user|>), which need not be one token.
    Added tokens that are only whitespace or ordinary text (Gemma has newlines and HTML tags) are left alone, and so are padding and unknown tokens
    that are ordinary text ("!"): they end nothing.
    """
    ends = {tokenizer.bos_token, tokenizer.eos_token}
    ordinary = {
        t for t in (tokenizer.pad_token, tokenizer.unk_token) if t and t not in ends and not _LOOKS_LIKE_ONE.search(t)
    }
    marks: set[str] = set(_MARK_IN_TEMPLATE.findall(template))
    ids: set[int] = set()
    for token_id, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        if text.strip() and text not in ordinary and (token.special or (text in template and not text.isalnum())):
            marks.add(text)
            ids.add(token_id)
    for text in tokenizer.all_special_tokens:
        if text.strip() and text not in ordinary:
            marks.add(text)
            ids.add(tokenizer.convert_tokens_to_ids(text))
    return sorted(marks, key=lambda mark: (-len(mark), mark)), frozenset(ids)


class Neutraliser:
    """Puts a space into every control mark of a text: `<|im_end|>` becomes `< |im_end|>`.

    The result holds none of the marks, and tokenises to none of `control_ids`, in any later templating of the
    stored text (TRL templates it again). Idempotent; text without marks comes back unchanged.
    """

    def __init__(self, tokenizer: Any, marks: Iterable[str], control_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._control_ids = control_ids
        marks = list(marks)
        self._pattern = re.compile("|".join(map(re.escape, marks))) if marks else None

    def __call__(self, text: str) -> tuple[str, int]:
        """The harmless text, and how many marks were broken."""
        count = 0
        while self._pattern is not None:
            text, broken = self._pattern.subn(lambda match: _break(match.group()), text)
            count += broken
            if not broken:
                break
        while span := self._control_span(text):
            start, stop = span
            text = text[:start] + _break(text[start:stop]) + text[stop:]
            count += 1
        return text, count

    def marks_in(self, text: str) -> list[str]:
        """The control marks that stand in a text, each once."""
        return list(dict.fromkeys(self._pattern.findall(text))) if self._pattern is not None else []

    def _control_span(self, text: str) -> tuple[int, int] | None:
        """Characters that still tokenise to a control token, for example after the tokenizer's normalisation."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for token_id, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token_id in self._control_ids and token_id != self._tokenizer.unk_token_id and stop > start:
                return start, stop
        return None


def _break(mark: str) -> str:
    return f"{mark[0]} {mark[1:]}" if len(mark) > 1 else " "
