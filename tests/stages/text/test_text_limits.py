"""A chat template that loops is one clear error, not a run that hangs."""

from __future__ import annotations

import copy
import time

import pytest

from schemas.config.model import TextConfig
from schemas.errors import UserError
from stages.text import render
from stages.text.limits import in_time

LOOP = (
    "{% for a in range(10000) %}{% for b in range(10000) %}{% for c in range(99) %}{% endfor %}{% endfor %}{% endfor %}"
)


def test_a_template_that_loops_is_refused_in_seconds(tiny_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_TEMPLATE_SECONDS", 0.3)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    # Ends after a second, for the sake of the tests that follow.
    end = time.monotonic() + 1.0
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *_, **__: _until(end))
    tokenizer.chat_template = LOOP
    with pytest.raises(UserError, match=r"does not end.*text\.chat_template"):
        render.Renderer(tokenizer, TextConfig())


def _until(end: float) -> dict:
    while time.monotonic() < end:
        time.sleep(0.01)
    return {"input_ids": [1]}


def test_results_and_errors_come_through() -> None:
    assert in_time(5, lambda: 3, UserError("late")) == 3
    with pytest.raises(KeyError):
        in_time(5, lambda: {}["x"], UserError("late"))
    with pytest.raises(UserError, match="late"):
        in_time(0.05, lambda: time.sleep(0.5), UserError("late"))
