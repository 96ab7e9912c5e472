"""Checks of languages, tokenizer, template, lengths and batch invariance find what is wrong, and pass what is not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from schemas.config import RunConfig
from schemas.config.sources import LanguageConfig
from stages.checks import invariance
from stages.checks.finding import Finding
from stages.checks.invariance import invariance_findings
from stages.checks.languages import language_findings
from stages.checks.text import length_findings, text_findings
from stages.contract import ModelRef


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    def make(**sections: Any) -> RunConfig:
        return RunConfig.model_validate(
            {
                "name": "t",
                "languages": {"seen": ["en", "zh", "ar"]},
                "model": {"policy": "m", "dtype": "float32"},
                "prompts": {"sources": [{"path": "x"}]},
                "gradients": {"sketch": {"dim": 512}},
                "execution": {"device": "cpu"},
                **sections,
            }
        )

    return make


def states(findings: Any) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.check, []).append(finding)
    return found


def test_languages_that_the_identifier_knows_pass() -> None:
    found = list(language_findings(LanguageConfig(seen=["en", "de", "zh"], unseen=["th"])))
    assert [finding.state for finding in found] == ["ok"]


def test_languages_it_does_not_know_or_cannot_tell_apart_are_named() -> None:
    found = list(language_findings(LanguageConfig(seen=["en", "zh-Hans", "zh-Hant", "ban"])))
    said = [finding.what for finding in found if finding.state == "warning"]
    assert any("does not know ban" in what for what in said)
    assert any("zh-Hans and zh-Hant cannot be told apart" in what for what in said)


def test_a_confidence_that_nothing_reaches_is_said() -> None:
    found = language_findings(LanguageConfig(seen=["de", "nl", "en"], min_confidence=1.0))
    assert any("languages.min_confidence 1.0" in finding.what for finding in found if finding.state == "warning")


def test_a_tokenizer_and_template_in_order_pass(tiny_model: Path, make_config: Callable[..., RunConfig]) -> None:
    found = states(text_findings(ModelRef("tiny", tiny_model, "d"), make_config()))
    assert [finding.state for findings in found.values() for finding in findings] == ["ok"] * 3
    assert found["end_of_turn"][0].what.startswith("answers end in <|im_end|>")
    assert set(found["tokenizer"][0].values) == {"en", "zh", "ar"}


def test_a_tokenizer_that_loses_a_script_is_found(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    letters = [chr(c) for c in range(32, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"], initial_alphabet=letters)
    tokenizer.train_from_iterator(["plain words"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    )
    fast.save_pretrained(tmp_path)
    found = states(text_findings(ModelRef("ascii", tmp_path, "d"), make_config()))
    said = [finding for finding in found["tokenizer"] if finding.state == "problem"]
    assert {finding.what.split()[3] for finding in said} >= {"zh", "ar"}


def test_special_tokens_that_reach_the_model_are_found(
    tiny_model: Path, make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.text.neutralise import Neutraliser

    monkeypatch.setattr(Neutraliser, "__call__", lambda self, text: (text, 0))
    found = states(text_findings(ModelRef("tiny", tiny_model, "d"), make_config()))
    assert found["special_tokens"][0].state == "problem" and "<|im_start|>" in found["special_tokens"][0].what


def test_lengths_that_leave_no_room_are_found(tiny_model: Path, make_config: Callable[..., RunConfig]) -> None:
    model = ModelRef("tiny", tiny_model, "d")

    def worst(**sections: Any) -> list[tuple[str, str]]:
        return [(f.state, f.what) for f in length_findings(model, make_config(**sections)) if f.state != "ok"]

    short = {"sampling": {"max_tokens": 8}}
    assert worst(text={"max_length": 4096})[0][0] == "problem"
    (judge,) = worst(text={"max_length": 1500}, generate=short, evaluate=short)
    assert judge[0] == "warning" and "leaves the judge 548 tokens" in judge[1]
    no_room = worst(text={"max_length": 64}, generate={"sampling": {"max_tokens": 64}}, evaluate=short)
    assert ("problem", True) in [(state, "generate.sampling.max_tokens 64" in what) for state, what in no_room]


def test_a_kernel_whose_rows_depend_on_their_batch_is_found(
    tiny_model: Path, make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.gradients import logprobs

    model, config = ModelRef("tiny", tiny_model, "d"), make_config()
    fine = states(invariance_findings(model, config))["batch_invariance"][0]
    assert fine.state == "ok" and float(fine.values["cosine"]) > 0.9999
    clean = logprobs.hidden_states

    def mixing(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTH = clean(model, ids_BT)
        rows = hidden_BTH.shape[0]
        return hidden_BTH * torch.linspace(-1, 1, hidden_BTH.shape[2]) if rows > 2 else hidden_BTH

    monkeypatch.setattr(logprobs, "hidden_states", mixing)
    found = states(invariance_findings(model, config))["batch_invariance"][0]
    assert found.state == "problem" and "gradients.token_budget: 64" in found.fix


@pytest.mark.parametrize("sketch", [{"method": "two_sided"}, {"method": "one_sided", "rank": 2}])
def test_the_model_is_gone_when_its_memory_is_given_back(
    sketch: dict[str, Any], tiny_model: Path, make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next check loads it again, in vLLM. What is measured is what the config sketches."""
    load, plan = invariance.load_text_model, invariance.SketchLayout.plan
    held: list[Any] = []
    alive: list[bool] = []
    planned: list[tuple[Any, ...]] = []

    def loaded(*arguments: Any) -> Any:
        model = load(*arguments)
        held.append(weakref.ref(model))
        return model

    def freed() -> None:
        gc.collect()
        alive.append(held[0]() is not None)

    monkeypatch.setattr(invariance, "load_text_model", loaded)
    monkeypatch.setattr(invariance, "free_memory", freed)
    monkeypatch.setattr(
        invariance.SketchLayout, "plan", lambda layers, *rest: planned.append(rest) or plan(layers, *rest)
    )
    config = make_config(gradients={"sketch": sketch})
    assert states(invariance_findings(ModelRef("tiny", tiny_model, "d"), config))["batch_invariance"][0].state == "ok"
    assert alive == [False]
    assert planned == [(config.gradients.sketch.dim, sketch["method"], config.gradients.sketch.rank)]
