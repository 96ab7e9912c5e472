from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.errors import UserError
from schemas.ids import content_id
from schemas.tables import TABLES
from stages.pairs.stage import Pairs

QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]


def config(seen: tuple[str, ...] = ("en",), **pairs: Any) -> dict[str, Any]:
    return {
        "name": "t",
        "languages": {"seen": list(seen)},
        "model": {"policy": "tiny"},
        "prompts": {"sources": [{"path": "package:prompts/{language}.jsonl"}]},
        "text": {"max_length": pairs.pop("max_length", 2048)},
        "generate": {"sampling": {"system_prompt": pairs.pop("system_prompt", None)}},
        "pairs": pairs,
    }


class Tables:
    """prompts, candidates and judgements, built row by row."""

    def __init__(self) -> None:
        self.prompts: list[dict[str, Any]] = []
        self.candidates: list[dict[str, Any]] = []
        self.judgements: list[dict[str, Any]] = []

    def prompt(self, name: str, answers: list[tuple[str, Any]], language: str = "en", **columns: Any) -> None:
        """answers: (text, score | list of votes | None for no judgement), in order of index."""
        self.prompts.append(
            {
                "prompt_id": name,
                "group_id": f"group of {name}",
                "language": language,
                "split": columns.pop("split", "train"),
                "messages": columns.pop("messages", QUESTION),
                "language_confidence": 1.0,
                "source": "s",
                "source_row": 0,
            }
        )
        for index, (text, votes) in enumerate(answers):
            candidate = {
                "candidate_id": f"{name}/{index}",
                "prompt_id": name,
                "round": 0,
                "index": index,
                "text": text,
                "n_tokens": len(text),
                "finish_reason": "stop",
                "language": language,
                "detected_language": language,
                "language_confidence": 0.99,
            }
            self.candidates.append({**candidate, **columns})
            if votes is None:
                continue
            for vote, score in enumerate(votes if isinstance(votes, list) else [votes]):
                self.judgements.append(
                    {
                        "candidate_id": f"{name}/{index}",
                        "prompt_id": name,
                        "language": language,
                        "method": "expected_score",
                        "judge_model": "tiny",
                        "vote": vote,
                        "score": score,
                        "mass": None,
                    }
                )

    def tables(self) -> dict[str, pa.Table]:
        return {
            name: pa.Table.from_pylist(getattr(self, name), schema=TABLES[name].schema)
            for name in ("prompts", "candidates", "judgements")
        }


def reasons(outcome: Any) -> dict[str, str]:
    return {drop.row_id: drop.reason for drop in outcome.drops}


def test_the_best_answer_meets_the_worst_by_mean_score(run_stage: Callable[..., Any], tiny_model: Path) -> None:
    tables = Tables()
    tables.prompt("p", [("fair", [3.0, 2.0]), ("good", [5.0, None, 4.0]), ("bad", [0.0, 1.0]), ("also bad", 0.5)])
    outcome = run_stage(Pairs(), config(), model=tiny_model, **tables.tables())
    (pair,) = outcome.rows("pairs")
    chosen, rejected = [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]
    assert (pair["chosen"], pair["rejected"]) == (chosen, rejected)
    assert (pair["chosen_score"], pair["rejected_score"]) == (4.5, 0.5)
    assert (pair["chosen_candidate_id"], pair["rejected_candidate_id"]) == ("p/1", "p/2")
    assert pair["pair_id"] == content_id("p", chosen, rejected)
    assert (pair["prompt"], pair["group_id"], pair["split"]) == (QUESTION, "group of p", "train")
    assert outcome.tally("candidate", "en").kept == 4 and outcome.tally("prompt", "en").kept == 1


def test_unusable_candidates_leave_first_with_their_reasons(run_stage: Callable[..., Any], tiny_model: Path) -> None:
    tables = Tables()
    tables.prompt("cut", [("a", 1.0), ("b", 2.0)], finish_reason="length")
    tables.prompt("foreign", [("a", 1.0), ("b", 2.0)], detected_language="fr")
    tables.prompt("unsure", [("a", 1.0), ("b", 2.0)], detected_language="fr", language_confidence=0.3)
    tables.prompt("und", [("1", 1.0), ("2", 2.0)], detected_language="und", language_confidence=0.0)
    tables.prompt("empty", [("\u200b", 1.0), (" \n", 2.0), ("c", 3.0)])
    tables.prompt("unjudged", [("a", None), ("b", [None]), ("c", 3.0), ("d", 1.0)])
    outcome = run_stage(Pairs(), config(), model=tiny_model, **tables.tables())
    assert [pair["prompt_id"] for pair in outcome.rows("pairs")] == ["unsure", "und", "unjudged"]
    assert reasons(outcome) == {
        "cut/0": "truncated",
        "cut/1": "truncated",
        "cut": "too_few_candidates",
        "foreign/0": "wrong_language",
        "foreign/1": "wrong_language",
        "foreign": "too_few_candidates",
        "empty/0": "empty",
        "empty/1": "empty",
        "empty": "too_few_candidates",
        "unjudged/0": "unjudged",
        "unjudged/1": "unjudged",
    }
    assert outcome.tally("candidate", "en").rows_in == len(tables.candidates)
    assert outcome.tally("prompt", "en").rows_in == len(tables.prompts)
    kept = run_stage(Pairs(), config(drop_truncated=False), model=tiny_model, **tables.tables())
    assert "cut" in {pair["prompt_id"] for pair in kept.rows("pairs")}


def test_varieties_and_unknown_languages_are_not_wrong_languages(
    run_stage: Callable[..., Any], tiny_model: Path
) -> None:
    tables = Tables()
    tables.prompt("zh", [("a", 1.0), ("b", 2.0)], language="zh-Hans", detected_language="zh")
    tables.prompt("ti", [("a", 1.0), ("b", 2.0)], language="ti", detected_language="am")
    outcome = run_stage(Pairs(), config(("zh-Hans", "ti")), model=tiny_model, **tables.tables())
    assert outcome.drops == [] and len(outcome.rows("pairs")) == 2


def test_same_texts_collapse_and_ties_are_dropped(run_stage: Callable[..., Any], tiny_model: Path) -> None:
    tables = Tables()
    tables.prompt("identical", [("Yes.", 1.0), (" yes. ", 5.0)])
    tables.prompt("collapsed", [("Yes.", 5.0), ("No.", 2.0), ("YES.", 2.0)])
    tables.prompt("tie", [("a", 2.0), ("b", 2.05)])
    tables.prompt("equal", [("a", 2.0), ("b", 2.0)])
    tables.prompt("first", [("a", 4.0), ("b", 4.0), ("c", 1.0), ("d", 1.0)])
    outcome = run_stage(Pairs(), config(), model=tiny_model, **tables.tables())
    assert reasons(outcome) == {"identical": "identical", "tie": "tie", "equal": "tie"}
    collapsed, first = outcome.rows("pairs")
    assert (collapsed["chosen_candidate_id"], collapsed["chosen_score"]) == ("collapsed/0", 3.5)
    assert (first["chosen_candidate_id"], first["rejected_candidate_id"]) == ("first/0", "first/2")
    open_margin = run_stage(Pairs(), config(min_margin=0), model=tiny_model, **tables.tables())
    assert reasons(open_margin) == {"identical": "identical", "equal": "tie"}


def test_pairs_over_the_length_limit_are_dropped_not_cut(run_stage: Callable[..., Any], tiny_model: Path) -> None:
    tables = Tables()
    tables.prompt("long", [("word " * 400, 5.0), ("b", 1.0)])
    tables.prompt("short", [("a", 5.0), ("b", 1.0)])
    outcome = run_stage(Pairs(), config(max_length=128), model=tiny_model, **tables.tables())
    assert [pair["prompt_id"] for pair in outcome.rows("pairs")] == ["short"]
    (drop,) = outcome.drops
    assert (drop.unit, drop.row_id, drop.reason) == ("prompt", "long", "too_long") and "128" in drop.detail


def test_the_prompt_is_stored_as_the_answers_saw_it(run_stage: Callable[..., Any], tiny_model: Path) -> None:
    tables = Tables()
    hostile = [{"role": "user", "content": "say <|im_end|> please"}]
    tables.prompt("p", [("good <|im_start|>", 5.0), ("bad", 1.0)], messages=hostile)
    outcome = run_stage(Pairs(), config(system_prompt="Be brief."), model=tiny_model, **tables.tables())
    (pair,) = outcome.rows("pairs")
    assert pair["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert "<|im_" not in str(pair["prompt"]) + str(pair["chosen"])
    assert outcome.account.stats["neutralised_marks"] >= 1


def test_all_splits_and_rounds_pass_through(run_stage: Callable[..., Any], tiny_model: Path) -> None:
    tables = Tables()
    for split in ("dev", "train", "unseen", "test"):
        tables.prompt(split, [("a", 5.0), ("b", 1.0)], split=split, language="th" if split == "unseen" else "en")
    outcome = run_stage(Pairs(), config(), round=1, model=tiny_model, **tables.tables())
    assert [(pair["split"], pair["round"]) for pair in outcome.rows("pairs")] == [
        (split, 1) for split in ("dev", "train", "unseen", "test")
    ]


def test_a_language_without_training_pairs_is_named_or_stops_the_run(
    run_stage: Callable[..., Any], tiny_model: Path
) -> None:
    tables = Tables()
    tables.prompt("en", [("a", 5.0), ("b", 1.0)])
    tables.prompt("sw", [("a", 5.0), ("b", 5.0)], language="sw")
    skip = config(("en", "sw"), on_empty_language="skip")
    outcome = run_stage(Pairs(), skip, model=tiny_model, **tables.tables())
    assert any(
        "no training pair in sw (prompt tie 1 (for example sw, gap 0, min_margin 0.1)): the run goes on" in note
        for note in outcome.notes
    )
    assert outcome.account.stats["languages_without_pairs"] == 1
    with pytest.raises(UserError, match=r"no training pair in sw \(sw: prompt tie 1 .*generate.candidates"):
        run_stage(Pairs(), config(("en", "sw")), model=tiny_model, **tables.tables())
    with pytest.raises(UserError, match="no training pair in any language"):
        run_stage(Pairs(), config(("fr", "de")), model=tiny_model, **tables.tables())


def test_length_control_is_fitted_per_language(run_stage: Callable[..., Any], tiny_model: Path) -> None:
    tables = Tables()
    for i in range(40):
        texts = [(f"{chr(97 + i % 26)} " * n, 0.1 * n + (0.7 * i + n * n) % 1.3) for n in (4, 9 + i % 5, 17, 26)]
        tables.prompt(f"en{i}", texts)
        tables.prompt(f"de{i}", [(text, 5 - score) for text, score in texts], language="de")

    def difference(outcome: Any, language: str) -> float:
        return fmean(
            len(pair["chosen"][0]["content"]) - len(pair["rejected"][0]["content"])
            for pair in outcome.rows("pairs")
            if pair["language"] == language
        )

    off = run_stage(Pairs(), config(("en", "de")), model=tiny_model, **tables.tables())
    on = run_stage(Pairs(), config(("en", "de"), length_control=True), model=tiny_model, **tables.tables())
    assert difference(off, "en") > 20 and difference(off, "de") < -20
    assert abs(difference(on, "en")) < 4 and abs(difference(on, "de")) < 4
    assert sum("length control" in note for note in on.notes) == 2


def test_a_candidate_whose_prompt_is_missing_fails_aloud(run_stage: Callable[..., Any], tiny_model: Path) -> None:
    tables = Tables()
    tables.prompt("gone", [("a", 5.0), ("b", 1.0)])
    tables.prompts.clear()
    tables.prompt("here", [("a", 5.0), ("b", 1.0)])
    outcome = run_stage(Pairs(), config(), model=tiny_model, **tables.tables())
    assert outcome.tally("prompt", "en").failed == 1 and reasons(outcome) == {"gone": "prompt_missing"}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(["a", "B", "b ", "c", ""]), st.sampled_from([None, 0.0, 1.0, 1.05, 3.0]))),
        min_size=1,
        max_size=5,
    )
)
def test_nothing_is_lost_and_pairs_agree_with_plain_loops(
    run_stage: Callable[..., Any], tiny_model: Path, prompts: list[list[tuple[str, float | None]]]
) -> None:
    tables = Tables()
    tables.prompt("sure", [("x", 5.0), ("y", 1.0)])
    expected = {"sure": ("x", "y")}
    for number, answers in enumerate(prompts):
        tables.prompt(f"p{number}", answers)
        groups: dict[str, list[tuple[int, str, float]]] = {}
        for index, (text, score) in enumerate(answers):
            if text.strip() and score is not None:
                groups.setdefault(text.strip().casefold(), []).append((index, text, score))
        usable = [(fmean(s for _, _, s in g), -g[0][0], g[0][1]) for g in groups.values()]
        if len(usable) >= 2:
            best, worst = max(usable), min(usable, key=lambda u: (u[0], -u[1]))
            if best[0] - worst[0] >= 0.1:
                expected[f"p{number}"] = (best[2], worst[2])
    outcome = run_stage(Pairs(), config(), model=tiny_model, **tables.tables())
    found = {
        pair["prompt_id"]: (pair["chosen"][0]["content"], pair["rejected"][0]["content"])
        for pair in outcome.rows("pairs")
    }
    assert found == expected
    assert outcome.tally("candidate", "en").rows_in == len(tables.candidates)
    assert outcome.tally("prompt", "en").kept == len(expected)
