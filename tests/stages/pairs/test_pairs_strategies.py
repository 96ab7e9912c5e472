"""Which answers of a prompt make pairs: strategies, margins in standard deviations, criteria and panels of judges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_pairs_from_candidates import Tables, config, reasons

from schemas.errors import UserError
from schemas.tables import TABLES
from stages.pairs.stage import Pairs

SCORES = [("a", 5.0), ("b", 3.0), ("c", 2.9), ("d", -40.0)]


def pairs_of(outcome: Any) -> list[tuple[str, str]]:
    return [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in outcome.rows("pairs")]


def judged(tables: Tables, scores: dict[str, list[float]], key: str) -> dict[str, pa.Table]:
    """The tables, judged by several: name of the judge or criterion -> scores of the candidates in order."""
    rows = [
        {**row, key: name, "score": value, "method": "expected_score", "judge_model": "tiny", "vote": 0}
        for name, values in scores.items()
        for row, value in zip(
            [{k: c[k] for k in ("candidate_id", "prompt_id", "language")} for c in tables.candidates],
            values,
            strict=True,
        )
        if value is not None
    ]
    return tables.tables() | {"judgements": pa.Table.from_pylist(rows, schema=TABLES["judgements"].schema)}


def test_every_strategy_picks_what_it_says(run_stage: Callable[..., Any], tiny_model: Path) -> None:
    tables = Tables()
    tables.prompt("p", SCORES)

    def run(**pairs: Any) -> list[tuple[str, str]]:
        outcome = run_stage(Pairs(), config(**pairs), model=tiny_model, **tables.tables())
        assert outcome.tally("prompt", "en").kept == len(outcome.rows("pairs"))
        return pairs_of(outcome)

    assert run() == run(strategy="best_worst") == [("a", "d")]
    mean, spread = np.mean([5, 3, 2.9, -40]), np.std([5, 3, 2.9, -40])
    nearest = {sign: min(SCORES, key=lambda s: abs(s[1] - (mean + sign * spread)))[0] for sign in (1, -1)}
    assert run(strategy="sigma", sigmas=1.0) == [(nearest[1], nearest[-1])]
    assert run(strategy="best_mean") == [("a", "c")]  # the mean is -7.3: 2.9 is closer than -40
    assert run(strategy="all", cap=99) == [("a", "d"), ("b", "d"), ("c", "d"), ("a", "c"), ("a", "b"), ("b", "c")]
    assert run(strategy="all", cap=99, min_margin=2.05) == [("a", "d"), ("b", "d"), ("c", "d"), ("a", "c")]
    assert run(strategy="all", cap=2) == [("a", "d"), ("b", "d")]
    ((best, other),) = run(strategy="best_random", min_margin=2.05)
    assert (best, other) in {("a", "c"), ("a", "d")}


def test_answers_that_repeat_themselves_leave_before_pairing_where_it_is_asked(
    run_stage: Callable[..., Any], tiny_model: Path
) -> None:
    tables = Tables()
    tables.prompt("p", [("the Rhine, in prose", 3.0), ("ha " * 60, 5.0), ("a short answer", 1.0)])
    outcome = run_stage(Pairs(), config(max_repetition=0.5), model=tiny_model, **tables.tables())
    assert pairs_of(outcome) == [("the Rhine, in prose", "a short answer")]
    assert reasons(outcome) == {"p/1": "repetitive"}
    assert outcome.drops[0].detail.endswith("> 0.5")
    kept = run_stage(Pairs(), config(), model=tiny_model, **tables.tables())
    assert pairs_of(kept)[0][0].startswith("ha ha") and not reasons(kept)


def test_answers_that_refuse_leave_before_pairing_where_it_is_asked(
    run_stage: Callable[..., Any], tiny_model: Path
) -> None:
    tables = Tables()
    tables.prompt("p", [("the Rhine", 3.0), ("<think>easy</think>I cannot help with that.", 5.0), ("the Elbe", 1.0)])
    tables.prompt("q", [("ຂໍໂທດ", 2.0), ("I'm unable to say.", 1.0)], language="lo", split="unseen")
    asked = config(drop_refusals=True) | {"languages": {"seen": ["en"], "unseen": ["lo"]}}
    outcome = run_stage(Pairs(), asked, model=tiny_model, **tables.tables())
    assert pairs_of(outcome) == [("the Rhine", "the Elbe")]
    assert reasons(outcome) == {"p/1": "refusal", "q/1": "refusal", "q": "too_few_candidates"}
    assert outcome.drops[0].detail == "i cannot help with"
    assert [note for note in outcome.notes if "drop_refusals" in note and " lo:" in note]
    kept = run_stage(Pairs(), config(), model=tiny_model, **tables.tables())
    assert len(pairs_of(kept)) == 2 and not reasons(kept) and not any("refusals" in note for note in kept.notes)


def test_the_random_loser_is_any_that_is_worse_by_the_margin(run_stage: Callable[..., Any], tiny_model: Path) -> None:
    tables = Tables()
    for number in range(40):
        tables.prompt(f"p{number}", [("best", 4.0), ("near", 3.95), ("worse", 2.0), ("worst", 1.0)])
    outcome = run_stage(Pairs(), config(strategy="best_random"), model=tiny_model, **tables.tables())
    losers = [rejected for _, rejected in pairs_of(outcome)]
    assert set(losers) == {"worse", "worst"} and 8 < losers.count("worst") < 32


def test_margins_in_standard_deviations_do_not_know_the_scale(run_stage: Callable[..., Any], tiny_model: Path) -> None:
    def run(scale: float) -> tuple[list[tuple[str, str]], dict[str, str]]:
        tables = Tables()
        tables.prompt("wide", [("a", 4.0 * scale), ("b", -4.0 * scale)])
        tables.prompt("narrow", [("c", 0.3 * scale), ("d", 0.0)])
        outcome = run_stage(Pairs(), config(margin_in="sd", min_margin=0.5), model=tiny_model, **tables.tables())
        return pairs_of(outcome), reasons(outcome)

    assert run(1.0) == run(1e-4) == run(1e4) == ([("a", "b")], {"narrow": "tie"})


def test_criteria_make_their_own_pairs_with_ids_of_their_own(run_stage: Callable[..., Any], tiny_model: Path) -> None:
    tables = Tables()
    tables.prompt("p", [("a", None), ("b", None), ("c", None)])
    tables.prompt("q", [("d", None), ("e", None)])
    scores = {"helpful": [3, 1, 2, 4, 2], "harmless": [3, 2, 1, 1.0, 1.0]}
    settings = {"criteria": {"helpful": {}, "harmless": {"method": "reward_model"}}}
    base = config() | {"judge": settings, "model": {"policy": "tiny", "judge": "j"}, "engine": {"kind": "transformers"}}
    outcome = run_stage(Pairs(), base, model=tiny_model, **judged(tables, scores, "criterion"))
    rows = outcome.rows("pairs")
    assert [(row["prompt_id"], row["criterion"]) for row in rows] == [
        ("p", "helpful"),
        ("p", "harmless"),
        ("q", "helpful"),
    ]
    assert pairs_of(outcome) == [("a", "b"), ("a", "c"), ("d", "e")]
    assert [(drop.row_id, drop.reason, drop.detail.split(":")[0]) for drop in outcome.drops] == [
        ("q", "tie", "harmless")
    ]
    assert outcome.tally("prompt", "en").rows_in == 4

    same = judged(tables, {"helpful": [3, 1, 2, 4, 2], "harmless": [3, 1, 2, 4, 2]}, "criterion")
    ids = [row["pair_id"] for row in run_stage(Pairs(), base, model=tiny_model, **same).rows("pairs")]
    assert len(set(ids)) == len(ids) == 4


def test_a_panel_is_the_mean_of_standardised_scores_or_must_agree(
    run_stage: Callable[..., Any], tiny_model: Path
) -> None:
    tables = Tables()
    tables.prompt("p", [("a", None), ("b", None), ("c", None)])
    tables.prompt("q", [("d", None), ("e", None)])
    scores = {"one": [1.0, 2.0, 5.0, 4.0, 3.0], "other": [100.0, 900.0, 800.0, 300.0, None]}
    panel = {"one": {}, "other": {}}

    def run(combine: str) -> Any:
        base = config() | {"judge": {"panel": panel, "combine": combine}}
        return run_stage(Pairs(), base, model=tiny_model, **judged(tables, scores, "judge"))

    outcome = run("mean")
    z = {
        name: (np.array(v) - np.nanmean(v)) / np.nanstd(v)
        for name, v in {n: np.array(v, dtype=float) for n, v in scores.items()}.items()
    }
    expected = (z["one"] + z["other"])[:3] / 2
    (pair,) = outcome.rows("pairs")
    assert (pair["chosen_score"], pair["rejected_score"]) == pytest.approx((expected.max(), expected.min()))
    assert pairs_of(outcome) == [("abc"[expected.argmax()], "abc"[expected.argmin()])] == [("c", "a")]
    assert reasons(outcome)["q"] == "too_few_candidates"
    assert outcome.account.stats["agreement one other"] == pytest.approx(2 / 3)
    assert any("judges one and other agree on 67% of 3 pairs" in note for note in outcome.notes)
    assert pairs_of(run("agree")) == [("c", "a")]
    scores["other"][0] = 850.0
    with pytest.raises(UserError, match="prompt disagreement 1"):
        run("agree")
