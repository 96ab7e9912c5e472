"""Generate: every prompt is answered, dropped or failed; seeds decide the answers, not shards or workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine_support import Scripted, joined, prompts, shards_of

from schemas.ids import content_id, seed_for
from schemas.tables import TABLES
from stages.contract import Context
from stages.engines import shared_engine
from stages.engines.base import Completion, Request
from stages.generate.stage import Generate

TEXTS = ["What is water?", "Wie alt ist die Erde?", "Name three rivers.", "x", "Why?"]


def test_every_prompt_has_its_candidates_in_order(make_context: Callable[..., Context]) -> None:
    ctx, rows = make_context(), prompts(TEXTS)
    parts = list(Generate().run(ctx, shards_of(rows, "prompts", 2)))
    candidates = joined(parts, "candidates")
    assert [(c["prompt_id"], c["index"]) for c in candidates] == [(r["prompt_id"], i) for r in rows for i in range(3)]
    for part in parts:
        assert part.tables["candidates"].schema.equals(TABLES["candidates"].schema)
    for c in candidates:
        assert c["candidate_id"] == content_id(c["prompt_id"], 0, c["index"], c["text"])
        assert 1 <= c["n_tokens"] <= 8
        assert c["finish_reason"] in ("stop", "length")
    assert len({c["text"] for c in candidates}) > len(rows)
    assert sum(t.kept for part in parts for t in part.tallies) == len(rows)
    assert sum(part.stats["generated_tokens"] for part in parts) == sum(c["n_tokens"] for c in candidates)
    assert ctx.progress.done == len(rows)
    assert ctx.progress.rates["tokens_per_s"] > 0


def test_a_shard_is_bit_for_bit_the_same_whichever_worker_makes_it(make_context: Callable[..., Context]) -> None:
    rows = prompts(TEXTS)
    whole = {part.index: part for part in Generate().run(make_context(), shards_of(rows, "prompts", 2))}
    for shard in shards_of(rows, "prompts", 2):
        (alone,) = Generate().run(make_context(), iter([shard]))
        assert alone.tables["candidates"].equals(whole[shard.index].tables["candidates"])


def test_run_seed_and_round_change_the_answers(make_context: Callable[..., Context]) -> None:
    rows = prompts(TEXTS[:2])

    def texts(ctx: Context) -> list[str]:
        return [c["text"] for c in joined(list(Generate().run(ctx, shards_of(rows, "prompts", 2))), "candidates")]

    first = texts(make_context())
    assert texts(make_context(seed=5)) != first
    assert texts(make_context(round=1)) != first
    assert texts(make_context()) == first


def test_after_round_0_only_the_train_split_is_answered(make_context: Callable[..., Context]) -> None:
    rows = prompts(TEXTS[:2]) + prompts(TEXTS[2:4], split="test") + prompts(TEXTS[4:], split="unseen", language="it")
    (part,) = Generate().run(make_context(round=1), shards_of(rows, "prompts", 9))
    assert {c["prompt_id"] for c in joined([part], "candidates")} == {row["prompt_id"] for row in rows[:2]}
    assert {d.row_id: d.reason for d in part.drops} == {row["prompt_id"]: "held_out_frozen" for row in rows[2:]}
    assert sum(t.rows_in for t in part.tallies) == len(rows)


def test_a_prompt_that_leaves_no_room_is_dropped_with_the_figures(make_context: Callable[..., Context]) -> None:
    rows = prompts(["short", "long " * 200])
    (part,) = Generate().run(make_context(), shards_of(rows, "prompts", 9))
    (drop,) = part.drops
    assert (drop.row_id, drop.reason, drop.failed) == (rows[1]["prompt_id"], "prompt_too_long", False)
    assert "> 128" in drop.detail
    assert len(joined([part], "candidates")) == 3


def test_a_prompt_that_cannot_be_rendered_fails_alone(make_context: Callable[..., Context]) -> None:
    rows = prompts(["good", "bad"])
    rows[1]["messages"] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (part,) = Generate().run(make_context(), shards_of(rows, "prompts", 9))
    assert [(d.row_id, d.reason, d.failed) for d in part.drops] == [(rows[1]["prompt_id"], "cannot_render", True)]


@pytest.fixture
def scripted(make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def run(answer: Callable[[Request], Completion], rows: list[dict[str, Any]], **sections: Any) -> Any:
        ctx = make_context(**sections)
        engine = Scripted(shared_engine(ctx, "policy"), answer)
        monkeypatch.setattr("stages.generate.stage.shared_engine", lambda ctx, role: engine)
        (part,) = Generate().run(ctx, shards_of(rows, "prompts", 99))
        return part, engine

    return run


def test_answers_are_stripped_neutralised_and_their_language_is_found(scripted: Callable[..., Any]) -> None:
    german = "  Die Erde ist ungefähr viereinhalb Milliarden Jahre alt. <|im_end|>\n"
    rows = prompts(["How old is the Earth?"])
    part, engine = scripted(lambda r: Completion(r.id, german, None, 9, "stop"), rows)
    candidate = joined([part], "candidates")[0]
    assert candidate["text"] == "Die Erde ist ungefähr viereinhalb Milliarden Jahre alt. < |im_end|>"
    assert (candidate["language"], candidate["detected_language"]) == ("en", "de")
    assert candidate["language_confidence"] > 0.9
    assert part.stats["neutralised_marks"] == 3
    assert [r.seed for r in engine.requests] == [seed_for(4, 0, rows[0]["prompt_id"], i) for i in range(3)]


def test_identification_can_be_off_and_empty_answers_stay(scripted: Callable[..., Any]) -> None:
    languages = {"seen": ["en"], "identify": False}
    part, _ = scripted(lambda r: Completion(r.id, " \n", None, 1, "stop"), prompts(["q"]), languages=languages)
    found = joined([part], "candidates")
    assert [(c["text"], c["detected_language"], c["language_confidence"]) for c in found] == [("", "und", 0.0)] * 3


def test_one_failed_candidate_fails_the_prompt_with_the_reason(scripted: Callable[..., Any]) -> None:
    rows = prompts(["one", "two"])

    def answer(request: Request) -> Completion:
        if request.id.endswith(f"{rows[1]['prompt_id']}/2"):
            return Completion(request.id, "", None, 0, "error", error="the server said no")
        return Completion(request.id, "fine", None, 2, "stop")

    part, _ = scripted(answer, rows)
    assert {c["prompt_id"] for c in joined([part], "candidates")} == {rows[0]["prompt_id"]}
    (drop,) = part.drops
    assert (drop.row_id, drop.reason, drop.detail, drop.failed) == (
        rows[1]["prompt_id"],
        "engine_error",
        "the server said no",
        True,
    )
    (counted,) = part.tallies
    assert (counted.rows_in, counted.kept, counted.failed) == (2, 1, 1)
