"""The win rate against a fixed baseline, on a prompt set of its own, and the agreement of two judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import UserError
from stages.contract import ModelRef
from stages.engines import Wanted
from stages.engines.base import Completion, Request, Tariff
from stages.evaluate import answers as answers_module
from stages.evaluate.kappa import kappa
from stages.sources import local_files
from stages.text.render import load_renderer

Verdict = Callable[[str], float]
RANKS = {"answer of trained": 2, "a fixed answer": 1, "answer of baseline": 1, "answer of initial": 0}


def by_rank(text: str) -> float:
    """The better answer of two, whatever its place."""
    first, second = sorted((name for name in RANKS if name in text), key=text.index)
    return 0.8 if RANKS[first] > RANKS[second] else 0.1


class Scripted:
    """Answers "answer of ROLE"; as a judge, gives A the probability `verdict(conversation)`."""

    context_length = 4096

    def __init__(self, renderer: Any, role: str, verdict: Verdict) -> None:
        self.renderer, self._role, self._verdict = renderer, role, verdict

    def stream(self, requests: Iterator[Request]) -> Iterator[Completion]:
        tokens = self.renderer.tokenizer.get_vocab()
        for request in requests:
            if not request.score_tokens:
                yield Completion(request.id, f"answer of {self._role}", [1], 1, "stop")
                continue
            p_a = self._verdict(self.renderer.tokenizer.decode(request.prompt_ids))
            logs = {tokens["A"]: float(torch.tensor(p_a).log()), tokens["B"]: float(torch.tensor(0.9 - p_a).log())}
            yield Completion(request.id, "", [], 0, "length", logs)


@pytest.fixture
def scripted(bench: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Verdict]:
    """Verdicts by role, to be changed by the test."""
    verdicts: dict[str, Verdict] = {}
    bench.models["evaluation_judge"] = replace(bench.models["evaluation_judge"], digest="digest-of-a-judge")

    def engine(ctx: Any, role: str) -> Any:
        return Scripted(load_renderer(ctx.models[role], ctx.config.text), role, verdicts.get(role, by_rank))

    def engines(ctx: Any, wanted: list[Wanted]) -> list[Any]:
        assert [one.engine.batch_size for one in wanted] == [3], "the second judge's own engine"
        return [engine(ctx, one.role) for one in wanted]

    monkeypatch.setattr(answers_module, "shared_engine", engine)
    monkeypatch.setattr(answers_module, "shared_engines", engines)
    return verdicts


def prompts_of(bench: Any, split: str, language: str) -> list[str]:
    return [r["prompt"][0]["content"] for r in bench.pairs if (r["split"], r["language"]) == (split, language)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def test_both_models_are_held_against_the_answers_of_a_file_and_missing_answers_are_counted(
    bench: Any, run_evaluate: Any, scripted: Any, tmp_path: Path
) -> None:
    rows = [
        {"instruction": text.upper(), "output": "a fixed answer", "generator": "gpt"}
        for text in prompts_of(bench, "test", "en")
    ]
    rows += [
        {"instruction": text, "output": "another", "generator": "llama"} for text in prompts_of(bench, "test", "en")
    ]
    rows.append({"instruction": "Something else?", "output": "a fixed answer", "generator": "gpt"})
    source = {"path": write(tmp_path / "answers.json", rows), "generator": "gpt"}
    ctx = bench.context(evaluate={"baseline": {"answers": [source]}})
    result = run_evaluate(ctx)
    for model, rate in (("before", 0.0), ("after", 1.0)):
        row = result.value(model, "test", "en", "baseline_win_rate")
        assert (row["value"], row["n"]) == (rate, 3)
        assert result.value(model, "test", "all", "judge_consistency")["value"] == 1.0
    assert result.value("after vs before", "test", "en", "baseline_win_rate_change")["value"] == 1.0
    assert not any(row["metric"].startswith("win_rate") for row in result.evaluation)
    texts = {(r["language"], r["text"]) for r in result.answers if r["model"] == "baseline"}
    assert texts == {("en", "a fixed answer")}
    drops = [(d.unit, d.reason) for d in result.account.drops]
    lacking = 2 * (len(prompts_of(bench, "dev", "en")) + 5)
    assert drops.count(("comparison", "no_baseline_answer")) == lacking
    assert drops.count(("row", "not_asked")) == 3 + 1
    assert len(drops) == lacking + 4
    units = {
        u: [sum(getattr(t, k) for t in result.account.tallies if t.unit == u) for k in ("rows_in", "kept")]
        for u in ("comparison", "row")
    }
    assert units == {"comparison": [20, 6], "row": [7, 3]}
    assert f"the baseline has no answer in {lacking} of 20 comparisons (dropped/evaluation)" in ctx.progress.notes
    assert ctx.progress.done == ctx.progress.amount


def test_a_model_as_the_baseline_answers_the_same_prompts(bench: Any, run_evaluate: Any, scripted: Any) -> None:
    bench.models["baseline"] = ModelRef("other", bench.models["initial"].path, "digest-other")
    ctx = bench.context(evaluate={"baseline": {"model": "some/model"}})
    result = run_evaluate(ctx)
    assert result.value("after", "test", "all", "baseline_win_rate")["value"] == 1.0
    assert result.value("before", "test", "all", "baseline_win_rate")["value"] == 0.0
    assert result.value("before", "test", "all", "baseline_win_rate_length_controlled")["n"] == 6
    assert {r["text"] for r in result.answers if r["model"] == "baseline"} == {"answer of baseline"}
    assert result.value("baseline", "test", "en", "characters")["value"] == len("answer of baseline")
    assert ctx.progress.done == ctx.progress.amount


def test_a_baseline_that_cannot_be_one_is_refused(bench: Any, run_evaluate: Any, scripted: Any, tmp_path: Path) -> None:
    text = prompts_of(bench, "test", "en")[0]
    two = [{"instruction": text, "output": said, "generator": f"model {said}"} for said in ("one", "two")]
    for name, rows, said in (
        ("two", two, "two answers to one prompt .generators model one and model two."),
        ("none", [{"instruction": "Other?", "output": "x"}], "None of the baseline's answers"),
    ):
        source = {"path": write(tmp_path / f"{name}.json", rows)}
        with pytest.raises(UserError, match=said):
            run_evaluate(bench.context(name, evaluate={"baseline": {"answers": [source]}}))


def test_a_prompt_set_takes_the_place_of_the_held_out_prompts(
    bench: Any, run_evaluate: Any, scripted: Any, tmp_path: Path
) -> None:
    seen = [{"instruction": f"What is the {n}th prime number, please?", "language": "en"} for n in range(3)]
    unseen = [{"instruction": "Quanto fa due più due, per favore?", "language": "it"}]
    rows = [*seen, *unseen, seen[0], {"instruction": prompts_of(bench, "train", "en")[0], "language": "en"}]
    rows.append({"instruction": "Was?", "language": "fr"})
    languages = {"seen": ["en", "de"], "unseen": ["it"]}
    result = run_evaluate(
        bench.context(languages=languages, evaluate={"prompts": [{"path": write(tmp_path / "set.json", rows)}]})
    )
    asked = {(r["split"], r["language"], r["messages"][0]["content"]) for r in result.answers}
    assert asked == {
        *(("test", "en", row["instruction"]) for row in seen),
        ("unseen", "it", unseen[0]["instruction"]),
    }
    assert result.value("after vs before", "unseen", "it", "win_rate")["value"] == 1.0
    drops = sorted((d.unit, d.reason) for d in result.account.drops if d.unit != "pair")
    assert drops == [("prompt", "in_training"), ("row", "duplicate"), ("row", "language_not_in_run")]


@pytest.mark.parametrize("spelt", ["", "{}/set.json", "{}/s*t.json", "{}/../{}/set.json"])
def test_a_group_id_of_another_data_set_is_another_group(
    bench: Any, run_evaluate: Any, scripted: Any, tmp_path: Path, spelt: str
) -> None:
    """Training has groups group-train-0 ...; the same names lose a prompt only where training reads the same file, however its path is spelt."""
    shared = bool(spelt)
    rows = [
        {"instruction": f"What is the {n}th prime number, please?", "language": "en", "group_id": f"group-train-{n}"}
        for n in range(3)
    ]
    path = write(tmp_path / "set.json", rows)
    read = spelt.format(tmp_path, tmp_path.name)
    training = {"prompts": {"sources": [{"path": read}]}} if shared else {}
    ctx = bench.context(evaluate={"prompts": [{"path": path}]}, **training)
    result = run_evaluate(ctx)
    assert len({r["prompt_id"] for r in result.answers}) == (0 if shared else 3)
    drops = [(d.unit, d.reason) for d in result.account.drops if d.unit != "pair"]
    assert drops == [("prompt", "translation_of_training")] * 3 * shared
    said = [note for note in ctx.progress.notes if note.startswith("evaluate.prompts")]
    assert said == ["evaluate.prompts: 3 rows are not asked (translation_of_training 3; dropped/evaluation)"] * shared


def test_prompts_that_the_baseline_answered_are_drawn_first(
    bench: Any, run_evaluate: Any, scripted: Any, tmp_path: Path
) -> None:
    prompts = [{"instruction": f"What is the {n}th prime number, please?", "language": "en"} for n in range(9)]
    answers = [{"instruction": prompts[n]["instruction"], "output": "a fixed answer"} for n in (2, 5, 7)]
    source, given = write(tmp_path / "set.json", prompts), write(tmp_path / "answers.json", answers)
    for limit, compared in ((2, 2), (4, 3)):
        evaluate = {"prompts": [{"path": source}], "baseline": {"answers": [{"path": given}]}}
        ctx = bench.context(str(limit), evaluate={**evaluate, "prompts_per_language": limit})
        result = run_evaluate(ctx)
        assert result.value("after", "test", "en", "baseline_win_rate")["n"] == compared
        assert result.value("after", "test", "en", "characters")["n"] == limit
        told = "the baseline has an answer to 3 of 9 prompts: they are drawn before the others"
        assert told in ctx.progress.notes
        drops = [(d.unit, d.reason) for d in result.account.drops if d.unit != "pair"]
        assert drops.count(("row", "not_asked")) == 3 - compared
        assert drops.count(("comparison", "no_baseline_answer")) == 2 * (limit - compared)
        rows = [t for t in result.account.tallies if t.unit == "row"]
        assert [sum(getattr(t, k) for t in rows) for k in ("rows_in", "kept")] == [3, compared]


@pytest.mark.parametrize("source", ["prompts", "authored", "baseline"])
def test_a_split_of_a_local_file_that_has_none_is_refused(bench: Any, tmp_path: Path, source: str) -> None:
    given = [{"path": write(tmp_path / "rows.json", [{"instruction": "a", "output": "b"}]), "split": "test"}]
    ctx = bench.context(evaluate={source: {"answers": given} if source == "baseline" else given})
    for one in ctx.config.evaluate.sources:
        if one.split is not None:
            with pytest.raises(UserError, match=r"`split` is for Hugging Face datasets here.*Leave `split: test` out"):
                local_files(one, ["en"])


def test_a_second_judge_behind_a_server_is_asked_each_question_once_and_its_cost_is_said(
    bench: Any, run_evaluate: Any, scripted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It dies after 3 replies; the next start asks the rest, and says what that may cost before and what it came to after."""
    bench.models["second_judge"] = ModelRef("second", bench.models["initial"].path, "digest-second")
    own = {"kind": "openai", "base_url": "http://localhost:1/v1", "input_price": 2.0, "output_price": 1.0}
    left, asked = [3], []

    class Server(Scripted):
        tariff, labels = Tariff("second at a server", 2.0, 1.0), ()

        def stream(self, requests: Iterator[Request]) -> Iterator[Completion]:
            for request in requests:
                if not left[0]:
                    raise UserError("it is gone")
                left[0] -= 1
                asked.append(request.id)
                yield from super().stream(iter([request]))

    def servers(ctx: Any, wanted: list[Wanted]) -> list[Any]:
        return [Server(load_renderer(ctx.models[one.role], ctx.config.text), one.role, by_rank) for one in wanted]

    monkeypatch.setattr(answers_module, "shared_engines", servers)
    contexts = []
    for left[0] in (3, 1000):
        ctx = bench.context(evaluate={"second_judge": {"model": "some/judge", "engine": own}})
        ctx.unfinished = lambda shard: tmp_path / f"unfinished-{shard}"
        contexts.append(ctx)
        if left[0] == 3:
            with pytest.raises(UserError, match="it is gone"):
                run_evaluate(ctx)
    result = run_evaluate(ctx)
    assert len(asked) == len(set(asked)) == 20, "ten prompts in both orders"
    before, after = [note for note in ctx.progress.notes if note.startswith("second at a server")]
    assert "asked about 17 times" in before and "at most" in before
    assert "answered 17 requests" in after and "3 more were answered before" in after
    assert result.value("after vs before", "test", "all", "judge_agreement")["value"] == 1.0
    stats = result.account.stats
    assert stats["generated_tokens"] == 20
    assert stats["cost"] == pytest.approx((2.0 * stats["prompt_tokens"] + 20) / 1e6)


def test_two_judges_are_compared_verdict_by_verdict(bench: Any, run_evaluate: Any, scripted: Any) -> None:
    bench.models["second_judge"] = ModelRef("second", bench.models["initial"].path, "digest-second")

    def german_only(text: str) -> float:
        return by_rank(text) if "erzähle" in text else 0.45  # a tie for the rest

    scripted["second_judge"] = german_only
    second = {"model": "some/judge", "engine": {"kind": "transformers", "batch_size": 3}}
    ctx = bench.context(evaluate={"second_judge": second})
    result = run_evaluate(ctx)
    assert result.value("after vs before", "test", "all", "win_rate")["value"] == 1.0, "the first judge's"
    for language, share in (("en", 0.0), ("de", 1.0), ("all", 0.5)):
        assert result.value("after vs before", "test", language, "judge_agreement")["value"] == share
    row = result.value("after vs before", "test", "all", "judge_kappa")
    assert (row["value"], row["n"]) == (0.0, 6), "one judge always says the same: nothing beyond chance"
    assert result.value("after vs before", "test", "de", "judge_kappa")["value"] is None
    assert sum(t.rows_in for t in result.account.tallies if t.unit == "comparison") == 20
    assert ctx.progress.done == ctx.progress.amount


def test_kappa_is_cohens() -> None:
    first = [1.0] * 25 + [0.0] * 25
    second = [1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15
    assert kappa(first, second) == pytest.approx(0.4), "the worked example of the textbooks: 20, 5, 10, 15"
    assert kappa([1.0, 0.5, 0.0], [1.0, 0.5, 0.0]) == 1.0
    metrics = pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(0)
    one, two = (torch.randint(0, 3, (60,), generator=draw).tolist() for _ in range(2))
    assert kappa(one, two) == pytest.approx(metrics.cohen_kappa_score(one, two), abs=1e-12)
