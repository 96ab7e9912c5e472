"""Judges in the config: what criteria and panels take over, and what cannot work is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.dataset_card import Contents, dataset_card
from schemas.config import RunConfig

BASE: dict[str, Any] = {
    "name": "t",
    "languages": {"seen": ["en", "de"]},
    "model": {"policy": "m"},
    "engine": {"kind": "transformers"},
    "prompts": {"sources": [{"path": "x.jsonl"}]},
}


def config(judge: dict[str, Any], **sections: Any) -> RunConfig:
    return RunConfig.model_validate(BASE | sections | {"judge": judge})


def test_what_a_criterion_or_panel_judge_leaves_out_is_the_judges_own() -> None:
    made = config(
        {
            "method": "additive",
            "votes": 3,
            "criteria": {
                "helpful": None,
                "harmless": {"rubric": "r.yaml", "panel": {"a": {}, "b": {"model": "other", "votes": 5}}},
                "short": {"method": "pairwise"},
            },
        }
    )
    found = {judge.key: judge for judge in made.judge.judges}
    assert list(found) == ["helpful/", "harmless/a", "harmless/b", "short/"]
    assert [found[key].settings.votes for key in ("helpful/", "harmless/a", "harmless/b")] == [3, 3, 5]
    assert found["harmless/a"].settings.rubric == "r.yaml" != found["helpful/"].settings.rubric
    assert made.judge.models == {"judge": None, "judge harmless/b": "other"}
    assert RunConfig.model_validate(made.model_dump(mode="json")) == made


@pytest.mark.parametrize(
    ("judge", "sections", "said"),
    [
        ({"method": "reward_model"}, {}, "set model.judge"),
        ({"method": "implicit_reward"}, {}, "needs judge.reference"),
        ({"method": "expected_score", "head": 1}, {}, "judge.head has no use"),
        ({"criteria": {"a": {"method": "pairwise", "votes": 2}}}, {}, "judge.criteria.a.votes has no use"),
        ({"combine": "agree"}, {}, "judge.combine has no use"),
        ({"panel": {"a": {}}, "criteria": {"b": {}}}, {}, "give each criterion its own panel"),
        ({"criteria": {"../x": {}}}, {}, "pattern"),
        (
            {"method": "implicit_reward", "reference": "r", "engine": {"kind": "openai", "base_url": "http://x/v1"}},
            {"model": {"policy": "m", "judge": "j"}},
            "cannot be run by engine.kind: openai",
        ),
        (
            {"method": "implicit_reward", "reference": "r", "cross_lingual": True},
            {"languages": {"seen": ["de", "fr"]}},
            "en is none of the run's languages",
        ),
        (
            {"criteria": {"a": {"model": "x"}, "b": {"model": "y"}}, "engine": {"kind": "vllm"}},
            {},
            "gpu_memory_utilization adds up to 1.8",
        ),
        ({"engine": {"kind": "openai"}}, {}, "needs engine.base_url"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(judge: dict[str, Any], sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said.replace(".", r"\.")):
        config(judge, **sections)


def test_reference_mode_needs_a_judge_that_repeats_itself() -> None:
    reference = {"execution": {"deterministic": True}, "model": {"policy": "m", "dtype": "float32"}}
    with pytest.raises(ValidationError, match=r"judge\.engine\.kind: vllm contradict"):
        config({"engine": {"kind": "vllm"}}, **reference)
    config({"engine": {"kind": "transformers"}}, **reference)


def test_of_a_sampling_in_part_the_rest_is_the_judges_own() -> None:
    own = {"method": "additive", "sampling": {"temperature": 0.2, "top_p": 0.9}}
    made = config({**own, "panel": {"a": {"sampling": {"max_tokens": 100}}, "b": {}}})
    (a, b) = (judge.settings.sampling for judge in made.judge.judges)
    assert (a.temperature, a.top_p, a.max_tokens) == (0.2, 0.9, 100) and (b.temperature, b.top_p) == (0.2, 0.9)


@pytest.mark.parametrize(
    ("judge", "model", "named"),
    [
        ({}, None, [None]),
        ({}, "m", ["m"]),
        ({"panel": {"a": {"model": "m"}, "b": {"model": "n"}}}, None, ["m", "n"]),
        ({"panel": {"a": {"model": "m"}, "b": {}}}, None, ["m", None]),
        ({"criteria": {"a": {"panel": {"c": {"model": "m"}, "d": {"model": "m"}}}}}, "x", ["m"]),
    ],
)
def test_who_judged_is_said_of_all_judges(judge: dict[str, Any], model: str | None, named: list[str | None]) -> None:
    made = config(judge, model={**BASE["model"], "judge": model})
    assert made.judge_models == named and made.judges_itself == (named == [None])
    found = dataset_card(made, 0, Contents("data/*.parquet", {"en": 1}, 1, 1), [])
    assert ("Self-judged" in found) == made.judges_itself
    assert all(name is None or name in found.split("labels are worth")[1] for name in named)


def test_judges_with_one_model_and_engine_need_one_share_of_the_gpu() -> None:
    config({"criteria": {"a": {}, "b": {"rubric": "r.yaml"}}, "engine": {"kind": "vllm"}})


@pytest.mark.parametrize(("share", "fits"), [(0.5, False), (0.475, True)])
def test_judges_that_are_loaded_together_leave_some_of_the_gpu(share: float, fits: bool) -> None:
    engine = {"kind": "vllm", "gpu_memory_utilization": share}
    judge = {"criteria": {"a": {"model": "x"}, "b": {"model": "y"}}, "engine": engine}
    if fits:
        config(judge)
    else:
        with pytest.raises(ValidationError, match=r"adds up to 1: .* at most 0\.95"):
            config(judge)
