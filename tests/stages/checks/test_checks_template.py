"""A chat template that loops, or eats memory, is one clear error before any work; the machine does not notice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from pipeline.models import Models
from pipeline.preflight import look_at_models
from pipeline.rundir import RunDir
from schemas.config import RunConfig
from schemas.config.model import TextConfig
from schemas.errors import UserError
from stages.checks.template import CPU_SECONDS, check_template
from stages.contract import ModelRef
from stages.schedule import schedule
from stages.text.render import Renderer
from tests.conftest import CHATML

DOUBLING = (
    "{% set box = namespace(text='aaaaaaaaaaaaaaaa') %}"
    "{% for _ in range(40) %}{% set box.text = box.text ~ box.text %}{% endfor %}"
)


@pytest.fixture
def check(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = ModelRef("tiny", tiny_model, "digest")

    def run(template: str, seconds: int = CPU_SECONDS) -> None:
        path = tmp_path / "template.jinja"
        path.write_text(template + CHATML, encoding="utf-8")
        check_template(model, TextConfig(chat_template=str(path)), False, seconds)

    return run


@pytest.mark.parametrize(
    ("template", "what"), [("{{ 10 ** (10 ** 9) }}", "longer than 2 s"), (DOUBLING, "more than 1 GiB of memory")]
)
def test_a_template_that_does_not_end_or_eats_memory_is_refused(check: Any, template: str, what: str) -> None:
    """Neither can be stopped in its own process: the one holds Python's lock, the other takes the machine's memory."""
    with pytest.raises(UserError, match=rf"takes {what}.*text\.chat_template"):
        check(template, 2 if what[-1] == "s" else CPU_SECONDS)


def test_a_good_template_is_tried_once(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check("")
    monkeypatch.setattr("subprocess.run", None)
    check("")
    with pytest.raises(TypeError):  # another template would be
        check("{# another #}")


def test_a_run_looks_before_it_does_anything(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("stages.checks.template.check_template", lambda model, *_: seen.append(model.name))
    config = RunConfig.model_validate(
        {
            "name": "t",
            "languages": {"seen": ["en"]},
            "model": {"policy": str(tiny_model), "judge": str(tiny_model)},
            "prompts": {"sources": [{"path": "p.jsonl"}]},
        }
    )
    look_at_models(config, Models(config, RunDir(tmp_path / "run")), schedule(config))
    assert seen == [str(tiny_model)]


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ range(10 ** 9) }}", "{{ none.a.b }}", "{{ [][3].x }}", "{{ 'a' + 1 }}"]
)
def test_what_a_template_raises_is_said_in_words(tiny_tokenizer: Any, template: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="chat template"):
        Renderer(tokenizer, TextConfig())
