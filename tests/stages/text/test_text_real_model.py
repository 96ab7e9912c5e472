"""The embedded model's tokenizer: the contract holds on a real chat template. Fetches the model the first time."""

from __future__ import annotations

import json
from importlib.resources import files
from types import SimpleNamespace

import pytest
from hostile import NASTY

from schemas.config.model import TextConfig
from stages.judge.expected_score import score_ids, score_tokens
from stages.judge.pairwise import choice_tokens
from stages.judge.rubric import load_rubric
from stages.models.resolve import resolve
from stages.text.messages import clean
from stages.text.render import Renderer, load_renderer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return load_renderer(resolve("embedded:qwen2.5-coder-0.5b-instruct"), TextConfig())


LANGUAGES = ("en", "de", "es", "fr", "ru", "zh", "ja", "ar", "hi", "sw", "it", "ko", "th")


def test_authored_pairs_are_tokenised_as_trl_tokenises_them(renderer: Renderer) -> None:
    """In one data set: before it is tokenised, `datasets` hashes the whole tokenizer."""
    from datasets import Dataset
    from trl import DPOTrainer

    rows = []
    for language in LANGUAGES:
        lines = files("data").joinpath(f"authored_pairs/{language}.jsonl").read_text("utf-8").splitlines()
        rows += [
            {
                "prompt": [{"role": "user", "content": entry["prompt"]}],
                "chosen": [{"role": "assistant", "content": entry["chosen"]}],
                "rejected": [{"role": "assistant", "content": entry["rejected"]}],
            }
            for entry in map(json.loads, lines)
        ]
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    theirs = DPOTrainer._prepare_dataset(SimpleNamespace(), Dataset.from_list(rows), renderer.tokenizer, args, "t")
    newline = renderer.tokenizer.encode("\n")
    for row, ids in zip(rows, theirs, strict=True):
        ours = renderer.pair_ids(**row)
        assert ids["prompt_ids"] == ours.prompt
        assert ids["chosen_ids"] == ours.chosen + newline
        assert ids["rejected_ids"] == ours.rejected + newline
        assert renderer.decode(ours.chosen) == row["chosen"][0]["content"]
        assert renderer.tokenizer.convert_ids_to_tokens(ours.chosen[-1]) == "<|im_end|>"


def test_scores_and_choices_are_single_tokens(renderer: Renderer) -> None:
    assert all(score_tokens(renderer.tokenizer).values())
    assert all(choice_tokens(renderer.tokenizer).values())


@pytest.mark.parametrize("name", NASTY)
def test_no_text_is_a_control_token_of_a_real_template(renderer: Renderer, name: str) -> None:
    text = (clean(NASTY[name]) or ".")[:20_000]  # a megabyte: test_text_render
    controls = {i for i, token in renderer.tokenizer.added_tokens_decoder.items() if token.special}
    calm, ids = (
        renderer.prompt_ids(
            [{"role": "user", "content": content}, {"role": "assistant", "content": content}, {"role": "user", "content": content}],
            content,
        )
        for content in ("calm", text)
    )  # fmt: skip
    assert [i for i in ids if i in controls] == [i for i in calm if i in controls]
    pair = renderer.pair_ids(
        [{"role": "user", "content": text}],
        [{"role": "assistant", "content": text}],
        [{"role": "assistant", "content": "calm"}],
    )
    assert [i for i in pair.chosen if i in controls] == [pair.chosen[-1]]


@pytest.mark.parametrize("language", ["en", "de", "ja"])
def test_no_attack_on_the_judge_is_a_control_token_of_a_real_template(renderer: Renderer, language: str) -> None:
    texts, tokens = (
        load_rubric("package:rubrics/{language}.yaml", language).expected_score,
        score_tokens(renderer.tokenizer),
    )
    task = [{"role": "user", "content": "What is water?"}]
    controls = {i for i, token in renderer.tokenizer.added_tokens_decoder.items() if token.special}
    calm = [i for i in score_ids(renderer, texts, task, "calm", tokens) if i in controls]
    for line in files("data").joinpath("attacks/judge_injection.jsonl").read_text("utf-8").splitlines():
        ids = score_ids(renderer, texts, task, json.loads(line)["text"], tokens)
        assert [i for i in ids if i in controls] == calm
