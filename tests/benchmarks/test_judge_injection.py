"""The injection benchmark measures every method that judges: tried on tiny random models."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import judge_injection
from schemas.config.judging import METHODS


def classifier(folder: Path, tokenizer: Any) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=4096, num_labels=1, pad_token_id=0, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_method_is_measured_under_attack(
    tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert set(judge_injection.METHODS) == set(METHODS)
    models = {
        "--model": tiny_model,
        "--reward-model": classifier(tmp_path / "reward", tiny_tokenizer),
        "--dpo-model": tiny_model,
        "--reference": tiny_model,
    }
    options = ["--engine", "transformers", "--every", "20", "--placed", "appended", "--additive", "1"]
    options += ["--max-tokens", "2", "--clean", "1", "--methods", *METHODS]
    named = [str(part) for pair in models.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["judge_injection", *options, *named])
    judge_injection.main()
    said = capsys.readouterr().out
    for method in set(METHODS) - {"additive"}:  # a random model writes no score
        for defence in ("raw", "fenced"):
            assert re.search(rf"^{method}, {defence}: clean .*unread 0 of", said, re.MULTILINE), said
    # the model and its reference are the same here
    assert re.search(r"implicit_reward, fenced: clean -?0.00.*\n.*\+0.00 ± 0.00", said), said


def test_a_method_without_its_model_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["judge_injection", "--methods", "implicit_reward", "--dpo-model", "m"])
    with pytest.raises(SystemExit):
        judge_injection.main()
    assert "needs --reference" in capsys.readouterr().err
