"""The model card is inert Markdown whatever the names in it are."""

from __future__ import annotations

import pytest
import yaml
from hostile import NASTY, STEERING
from markdown_it import MarkdownIt

from schemas.config import RunConfig
from schemas.config.training import TrainConfig
from stages.contract import ModelRef
from stages.train.batches import BatchPlan, plan_batches
from stages.train.card import Training, model_card
from stages.train.card_page import adapter_card
from stages.train.seen import Seen

CONFIG = RunConfig.model_validate(
    {
        "name": "t",
        "languages": {"seen": ["en"]},
        "model": {"policy": "m"},
        "prompts": {"sources": [{"path": "p.jsonl"}]},
    }
)


def training(name: str = "m", reference: str = "m", plan: BatchPlan | None = None, **seen: int) -> Training:
    base = ModelRef(name, None, "d")
    seen = seen or {"en": 2}
    return Training(
        base, ModelRef(reference, None, "d"), 0, Seen(seen, sum(seen.values())), plan or BatchPlan(1, 1, 1, 1, 0), 1
    )


@pytest.mark.parametrize("name", NASTY)
def test_any_name_in_a_model_card_is_text(name: str) -> None:
    text = NASTY[name]
    objectives = [
        {"name": text.encode("utf-8", "replace").decode() or "x", "where": "true"},
        {"name": "other", "where": "true"},
    ]
    train = TrainConfig.model_validate({"orthalign": {"objectives": objectives}})
    config = CONFIG.model_copy(update={"name": text, "banner": text, "train": train})
    card = model_card(config, training(text, text, **{text: 1, "en": 2}))
    card.encode("utf-8")
    assert "\\" not in card.partition("\n---\n")[2]
    _, header, body = card.split("---\n", 2)
    assert set(yaml.safe_load(header)) == {"library_name", "pipeline_tag", "tags", "language"}
    assert not STEERING & set(card)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    kinds = {child.type for token in tokens for child in [token, *(token.children or [])]}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "fence", "hr", "em_open", "strong_open"}
    assert sum(token.type == "heading_open" for token in tokens) == 4
    assert sum(token.type == "td_open" for token in tokens) == 2 * (3 + 14)


def test_the_card_of_a_sequence_names_its_references_and_its_warm_up() -> None:
    objectives = [{"name": "one", "where": "true"}, {"name": "other", "where": "true"}]
    train = TrainConfig.model_validate({"orthalign": {"objectives": objectives}})
    plan = BatchPlan(1, 1, 1, 1, 17)
    card = model_card(CONFIG.model_copy(update={"train": train}), training("m", "ref", plan))
    assert "ref for the first objective, then the model as each objective starts." in card
    assert "10% of its steps warm up" in card and "17 warm-up" not in card
    card = model_card(CONFIG, training("m", "ref", plan))
    assert "Reference model of the loss: ref." in card and "17 warm-up steps" in card


def card_of(devices: int = 1, **train: object) -> str:
    config = CONFIG.model_copy(update={"train": TrainConfig.model_validate(train)})
    return model_card(config, training(plan=plan_batches(64, config.train, devices)))


@pytest.mark.parametrize("devices", [1, 2])
def test_the_cards_pairs_per_step_are_those_of_all_processes(devices: int) -> None:
    assert "| pairs per step | 8 |" in card_of(devices, batch_size=8, micro_batch_size=2)


def test_the_card_names_every_setting_of_a_method_that_changes_the_weights() -> None:
    merge = {"alpha": 0.1, "reserve": 0.5, "preset": "released", "rescale": True}
    assert "rescaled to the L1 norm before" in card_of(method="full", optimizer="onties", merge=merge)
    sequence = {"objectives": [{"name": n, "where": "true"} for n in "ab"], "trust_radius": 0.25}
    assert "at most 0.25" in card_of(method="full", orthalign=sequence)
    allo = {
        "mask": "gradient",
        "token_reward": "classifier",
        "reward_model": "judge",
        "forget_learning_rate": 3e-4,
        "forget_max_steps": 7,
    }
    card = card_of(method="full", allo=allo)
    for words in ("classifier by judge", "learning rate 0.0003, 7 steps"):
        assert words in card


def header(card: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(card.split("---\n", 2)[1])
    return found


def test_the_header_is_the_hubs_and_nothing_in_it_is_guessed() -> None:
    plain = header(model_card(CONFIG, training()))
    assert not plain.keys() & {"base_model", "datasets", "license"}  # a folder, files, nothing said
    config = RunConfig.model_validate(
        {
            "name": "t",
            "languages": {"seen": ["en", "zh-Hans"]},
            "model": {"policy": "m"},
            "pairs": {"sources": [{"path": "org/pairs-{language}", "format": "hub"}, {"path": "own.jsonl"}]},
            "card": {"model_license": "apache-2.0"},
        }
    )
    ref = ModelRef("org/base", None, "d", hub="org/base", revision="c" * 40)
    card = model_card(
        config, Training(ref, ref, 0, Seen({"en": 1, "zh-Hans": 1, "und": 1}, 3), BatchPlan(1, 1, 1, 1, 0), 3)
    )
    expected = {
        "base_model": "org/base",
        "license": "apache-2.0",
        "datasets": ["org/pairs-en", "org/pairs-zh-Hans"],
        "language": ["en", "zh"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "trl", "congrad"],
    }
    assert header(card) == expected
    adapter = adapter_card(card)
    assert header(adapter) == expected | {"library_name": "peft", "tags": ["dpo", "trl", "congrad", "lora"]}
    assert adapter.partition("\n---\n")[2].strip() == card.partition("\n---\n")[2].strip()


def test_a_card_names_no_folder_of_this_machine() -> None:
    card = model_card(CONFIG, training("/home/somebody/models/mine", "/home/somebody/other/"))
    assert "somebody" not in card and "mine, aligned" in card and "loss: other." in card


def test_a_card_says_what_was_used_and_no_path_of_this_machine() -> None:
    train = {
        "seed": 11,
        "method": "full",
        "allo": {"mask": "warmup", "token_reward": "dpo_model", "reward_model": "/home/me/rm"},
    }
    config = RunConfig.model_validate(CONFIG.model_dump() | {"seed": 3, "train": train})
    card = model_card(config, training())
    assert "| seed | 11, round 0 |" in card and "| numbers | bfloat16 |" in card
    assert "by rm, beta" in card and "/home" not in card
    assert "Reference model of the loss: the model as forgetting left it." in card
