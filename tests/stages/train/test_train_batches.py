"""How pairs become steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.preflight import preflight
from schemas.config import RunConfig
from schemas.config.sft import SftConfig
from schemas.config.trainer import TrainerConfig
from schemas.config.training import TrainConfig
from schemas.errors import UserError
from stages.catalog import BY_NAME
from stages.train.batches import plan_batches, plan_last


def test_the_global_batch_is_micro_times_accumulation_times_devices() -> None:
    plan = plan_batches(100, TrainConfig(batch_size=16, micro_batch_size=2, epochs=2), devices=4)
    assert (plan.micro_batch, plan.accumulation, plan.steps_per_epoch, plan.steps) == (2, 2, 7, 14)


def test_a_batch_that_does_not_divide_is_refused_naming_both_keys() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size.*train\.micro_batch_size"):
        plan_batches(100, TrainConfig(batch_size=10, micro_batch_size=4))


def test_a_micro_batch_above_the_batch_is_reduced_aloud() -> None:
    plan = plan_batches(100, TrainConfig(batch_size=1, micro_batch_size=2))
    assert plan.micro_batch == 1 and any("micro_batch_size" in note for note in plan.notes)


def test_a_batch_larger_than_the_data_is_said_aloud() -> None:
    plan = plan_batches(5, TrainConfig(batch_size=32, micro_batch_size=2))
    assert plan.steps_per_epoch == 1 and any("the 5 pairs" in note for note in plan.notes)


def test_max_steps_counts_instead_of_epochs_as_in_transformers() -> None:
    assert plan_batches(100, TrainConfig(batch_size=10, micro_batch_size=2, max_steps=3)).steps == 3
    assert plan_batches(100, TrainConfig(batch_size=10, micro_batch_size=2, max_steps=30)).steps == 30


@pytest.mark.parametrize("section", [TrainConfig, SftConfig])
def test_a_length_that_is_none_is_refused(section: type[TrainerConfig]) -> None:
    with pytest.raises(ValidationError, match=rf"{section.section}\.max_steps is 0"):
        section(max_steps=0)
    assert section(max_steps=5, epochs=1).max_steps == 5  # a resolved config names both


@settings(deadline=None, print_blob=True)  # the promise is arithmetic, not speed
@given(st.integers(1, 500), st.integers(1, 8), st.integers(1, 8), st.floats(0.01, 5))
def test_steps_cover_the_epochs(pairs: int, micro: int, accumulation: int, epochs: float) -> None:
    batch = micro * accumulation
    plan = plan_batches(pairs, TrainConfig(batch_size=batch, micro_batch_size=micro, epochs=epochs))
    assert plan.steps * batch >= epochs * pairs
    assert (plan.steps_per_epoch - 1) * batch < pairs <= plan.steps_per_epoch * batch
    assert 0 <= plan.warmup_steps <= plan.steps


def test_a_short_run_is_not_all_warm_up() -> None:
    """The warm-up starts at learning rate 0: with one or two steps it would train nothing."""
    for steps in (1, 2, 9):
        plan = plan_batches(100, TrainConfig(batch_size=2, micro_batch_size=2, max_steps=steps, warmup_ratio=0.1))
        assert plan.warmup_steps == 0
    assert plan_batches(100, TrainConfig(batch_size=2, max_steps=40, warmup_ratio=0.1)).warmup_steps == 4


WINDOW_50: dict[str, Any] = {"optimizer": "onties", "method": "full", "merge": {"every": 50, "base": "b"}}
CUT_WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "micro": ("train", {"batch_size": 10, "micro_batch_size": 4}, "is not a multiple of train.micro_batch_size 4"),
    "processes": ("train", {"batch_size": 16, "processes": 3}, "micro_batch_size 2 times 3 processes"),
    "too many": ("train", {"batch_size": 4, "processes": 2, "nodes": 4}, "smaller than the 8 processes"),
    "window": (
        "train",
        {"optimizer": "onties", "method": "full", "max_steps": 3, "merge": {"every": 4, "base": "b"}},
        "merge.every is 4 and the run has 3 steps",
    ),
    "window of forgetting": (
        "train",
        WINDOW_50 | {"max_steps": 100, "allo": {"mask": "gradient", "forget_max_steps": 10}},
        "merge.every is 50 and forgetting has 10 steps",
    ),
    "window of learning": (
        "train",
        WINDOW_50 | {"max_steps": 10, "allo": {"mask": "gradient", "forget_max_steps": 100}},
        "merge.every is 50 and learning has 10 steps",
    ),
    "sft": ("sft", {"batch_size": 3, "micro_batch_size": 2, "sources": [{"path": "s"}]}, "sft.batch_size 3 is not"),
}


@pytest.mark.parametrize("case", CUT_WRONG)
def test_batches_that_cannot_be_cut_are_refused_before_any_stage(case: str) -> None:
    """Not after hours, when training begins."""
    section, settings, words = CUT_WRONG[case]
    common = {
        "name": "t",
        "languages": {"seen": ["en"]},
        "model": {"policy": "m"},
        "pairs": {"sources": [{"path": "p"}]},
    }
    spec = replace(BY_NAME[section], needs=())
    preflight(RunConfig.model_validate(common | {"train": {}}), [spec] if section == "train" else [])
    with pytest.raises(UserError, match=words):
        preflight(RunConfig.model_validate(common | {section: settings}), [spec])


def test_a_phase_that_is_not_trained_is_not_planned() -> None:
    """The window is that of forgetting: learning, which there is not, would have one step."""
    allo = {"mask": "gradient", "learn": False, "forget_max_steps": 100}
    plan = plan_last(5, TrainConfig.model_validate(WINDOW_50 | {"batch_size": 32, "allo": allo}), 1)
    assert plan.steps == 100
    with pytest.raises(UserError, match=r"merge\.every is 50 and forgetting has 1 steps"):
        plan_last(5, TrainConfig.model_validate(WINDOW_50 | {"allo": allo | {"forget_max_steps": -1}}), 1)
