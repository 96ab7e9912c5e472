"""The evaluate stage on a tiny model: figures, account, no training row, sub-steps, loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.errors import UserError
from stages.contract import ModelRef, Stopped
from stages.engines.base import Completion, Request
from stages.evaluate import answers as answers_module
from stages.evaluate import loglik
from stages.text.render import RenderError, load_renderer


def mean_logprobs(folder: Any, bench: Any, row: dict[str, Any]) -> tuple[float, float]:
    """Mean-token log-probability of both sides from plain float64 logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    config = bench.context().config
    ids = load_renderer(bench.models["initial"], config.text).pair_ids(row["prompt"], row["chosen"], row["rejected"])
    means = []
    for answer in (ids.chosen, ids.rejected):
        with torch.no_grad():
            logps = model(torch.tensor([ids.prompt + answer])).logits[0].log_softmax(-1)
        means.append(sum(float(logps[len(ids.prompt) - 1 + t, c]) for t, c in enumerate(answer)) / len(answer))
    return means[0], means[1]


def test_figures_equal_an_independent_computation(bench: Any, run_evaluate: Any) -> None:
    result = run_evaluate(bench.context())
    rows = [row for row in bench.pairs if row["split"] == "test" and row["language"] == "en"]
    sides = {
        model: [mean_logprobs(bench.models[role].path, bench, row) for row in rows]
        for model, role in (("before", "initial"), ("after", "trained"))
    }
    for model, found in sides.items():
        accuracy = result.value(model, "test", "en", "accuracy")
        assert (accuracy["value"], accuracy["n"]) == (sum(c > r for c, r in found) / 3, 3)
        logp = result.value(model, "test", "en", "logp_chosen")
        assert logp["value"] == pytest.approx(sum(c for c, _ in found) / 3, abs=1e-5)
    change = result.value("after vs before", "test", "en", "logp_chosen_change")
    expected = [a[0] - b[0] for a, b in zip(sides["after"], sides["before"], strict=True)]
    assert change["value"] == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert change["low"] is None, "three groups are too few for a bootstrap"


def test_every_split_and_language_and_all_are_reported_and_counts_balance(bench: Any, run_evaluate: Any) -> None:
    ctx = bench.context()
    result = run_evaluate(ctx)
    keys = {(r["split"], r["language"]): r["n"] for r in result.evaluation if r["metric"] == "accuracy"}
    assert keys == {
        **{("dev", x): n for x, n in (("en", 2), ("de", 2), ("all", 4))},
        **{("test", x): n for x, n in (("en", 3), ("de", 3), ("all", 6))},
        **{("authored", x): n for x, n in (("en", 2), ("de", 2), ("all", 4))},
        ("unseen", "all"): 0,
    }
    assert result.value("before", "unseen", "all", "accuracy")["value"] is None
    tallies = {(t.unit, t.language): (t.rows_in, t.kept) for t in result.account.tallies if t.unit != "comparison"}
    assert tallies == {(unit, x): (n, n) for unit, n in (("pair", 7), ("prompt", 5)) for x in ("en", "de")}
    assert [t.rows_in for t in result.account.tallies if t.unit == "comparison"] == [5, 5]
    assert len(result.answers) == 2 * 10
    assert {row["model"] for row in result.answers} == {"before", "after"}
    assert not any(r["metric"] == "implicit_reward_accuracy" and r["model"] == "before" for r in result.evaluation)
    assert result.value("after", "test", "all", "answer_language")["n"] == 6
    assert result.value("after", "dev", "en", "truncated")["n"] == 2
    assert result.value("before", "dev", "de", "refused")["n"] == 2
    assert ctx.progress.done == ctx.progress.amount == 2 * 14 + 2 * 10 + 2 * 10


def test_an_untrained_model_changes_nothing_and_ties(bench: Any, run_evaluate: Any) -> None:
    bench.models["trained"] = replace(bench.models["trained"], path=bench.models["initial"].path)
    result = run_evaluate(bench.context())
    for metric, value in (("logp_chosen_change", 0.0), ("accuracy_change", 0.0), ("win_rate_self_judged", 0.5)):
        assert result.value("after vs before", "test", "all", metric)["value"] == value
    assert result.value("after", "test", "all", "implicit_reward_accuracy")["value"] == 0.5


def test_ties_count_one_half() -> None:
    assert [loglik.preference(*p) for p in ((1.0, 0.0), (0.0, 1.0), (-2.5, -2.5))] == [1.0, 0.0, 0.5]


def test_no_training_row_is_evaluated(bench: Any, run_evaluate: Any) -> None:
    train = next(row for row in bench.pairs if row["split"] == "train" and row["language"] == "en")
    number = 90
    for changes in (
        {"prompt_id": train["prompt_id"]},
        {"group_id": train["group_id"]},
        {"prompt": [{"role": "user", "content": "  " + train["prompt"][0]["content"].upper() + "\n"}]},
    ):
        bench.add_pair("en", "test", number, **changes)
        number += 1
    bench.authored.append(
        {
            "group_id": "new",
            "language": "en",
            "prompt": train["prompt"][0]["content"].lower(),
            "chosen": "a",
            "rejected": "b",
        }
    )
    bench.authored.append(
        {"group_id": train["group_id"], "language": "de", "prompt": "Etwas anderes?", "chosen": "a", "rejected": "b"}
    )
    result = run_evaluate(bench.context())
    reasons = sorted((d.unit, d.reason) for d in result.account.drops if d.unit != "comparison")
    assert reasons == sorted(
        [("pair", "in_training")] * 3
        + [("pair", "translation_of_training")] * 2
        + [("prompt", "in_training")] * 2
        + [("prompt", "translation_of_training")]
    )
    assert result.value("before", "test", "en", "accuracy")["n"] == 3
    assert result.value("before", "authored", "all", "accuracy")["n"] == 4
    trained_on = {row["prompt_id"] for row in bench.pairs if row["split"] == "train"}
    assert trained_on.isdisjoint(row["prompt_id"] for row in result.answers)
    assert sum(t.rows_in - t.kept for t in result.account.tallies if t.unit != "comparison") == 8


def test_imported_pairs_bring_the_prompts(bench: Any, run_evaluate: Any) -> None:
    result = run_evaluate(bench.context(imported=True))
    held_out = {row["prompt_id"] for row in bench.pairs if row["split"] != "train"}
    assert {row["prompt_id"] for row in result.answers} == held_out


def test_limits_are_kept_and_the_choice_does_not_depend_on_the_order(bench: Any, run_evaluate: Any) -> None:
    limits = {"prompts_per_language": 2, "pairs_per_language": 1, "win_rate": False}
    first = run_evaluate(bench.context("a", evaluate=limits))
    bench.pairs.reverse()
    second = run_evaluate(bench.context("b", evaluate=limits))
    assert first.value("before", "test", "de", "accuracy")["n"] == 1
    assert len(first.answers) == 2 * 2 * 2
    assert {a["prompt_id"] for a in first.answers} == {a["prompt_id"] for a in second.answers}
    assert first.evaluation == second.evaluation
    assert {d.reason for d in first.account.drops} == {"not_sampled"}


def test_rows_that_cannot_be_used_are_counted(bench: Any, run_evaluate: Any) -> None:
    bench.authored.append(
        {"group_id": "x", "language": "en", "prompt": "Q?", "chosen": "same", "rejected": " same\u200b"}
    )
    bench.authored.append({"group_id": "y", "language": "fr", "prompt": "Q?", "chosen": "a", "rejected": "b"})
    bench.authored.append({"group_id": "z", "language": "en", "prompt": "Q " * 300, "chosen": "a", "rejected": "b"})
    bench.prompts = [{**r, "messages": [{"role": "user", "content": "long " * 300}]} for r in _prompts(bench)[-1:]]
    result = run_evaluate(bench.context())
    assert sorted((d.unit, d.reason) for d in result.account.drops) == [
        ("pair", "too_long"),
        ("prompt", "prompt_too_long"),
        ("row", "identical"),
        ("row", "language_not_in_run"),
    ]
    assert result.answers == []


def _prompts(bench: Any) -> list[dict[str, Any]]:
    return [
        {name: row[name] for name in ("prompt_id", "group_id", "language", "split")}
        | {"messages": row["prompt"], "language_confidence": 1.0, "source": "s", "source_row": 0}
        for row in bench.pairs
    ]


class Loads:
    """Counts what is loaded, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models: list[str] = []
        self.engines: list[str] = []
        load, shared = loglik.load_text_model, answers_module.shared_engine

        def counting_load(model: ModelRef, *args: Any) -> Any:
            self.models.append(model.digest)
            return load(model, *args)

        def counting_engine(ctx: Any, role: str) -> Any:
            before = list(ctx.shared.get("engines", {}).values())
            engine = shared(ctx, role)
            if not any(engine is other for other in before):
                self.engines.append(role)
            return engine

        monkeypatch.setattr(loglik, "load_text_model", counting_load)
        monkeypatch.setattr(answers_module, "shared_engine", counting_engine)


def test_each_model_is_loaded_once_for_scoring_and_once_for_answering(
    bench: Any, run_evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads(monkeypatch)
    run_evaluate(bench.context())
    assert loads.models == ["digest-initial", "digest-trained"]
    assert loads.engines == ["trained", "initial"]  # the judge is the initial policy: its engine is still there


def test_a_crash_repeats_only_the_unfinished_sub_step(
    bench: Any, run_evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.evaluate.winrate import Comparison

    whole = run_evaluate(bench.context("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "judge", lambda self: (_ for _ in ()).throw(RuntimeError("crash")))
        with pytest.raises(RuntimeError, match="crash"):
            run_evaluate(bench.context("crashed"))
    loads = Loads(monkeypatch)
    again = run_evaluate(bench.context("crashed"))
    assert (loads.models, loads.engines) == ([], ["evaluation_judge"])
    assert (again.evaluation, again.answers) == (whole.evaluation, whole.answers)


def test_sub_steps_are_tied_to_the_models(bench: Any, run_evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_evaluate(bench.context())
    bench.models["trained"] = replace(bench.models["trained"], digest="digest-of-another-training")
    loads = Loads(monkeypatch)
    run_evaluate(bench.context())
    assert loads.models == ["digest-of-another-training"] and loads.engines[0] == "trained"


def test_a_pair_that_does_not_fit_in_memory_fails_and_the_others_are_measured(
    bench: Any, run_evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.evaluate import loglik

    whole, score_rows = run_evaluate(bench.context("whole")), loglik.logprobs_of_rows

    def scored(model: Any, rows: Any, budget: Any, misfits: list[int], done: Any) -> Any:
        misfits += [1]
        return [values for n, values in enumerate(score_rows(model, rows, budget)) if n != 1]

    monkeypatch.setattr(loglik, "logprobs_of_rows", scored)
    got = run_evaluate(bench.context("small"))
    failed = [drop for drop in got.account.drops if drop.reason == "out_of_memory"]
    assert len(failed) == 1 and failed[0].failed and failed[0].unit == "pair"
    for one, other in zip(whole.account.tallies, got.account.tallies, strict=True):
        assert one.rows_in == other.rows_in
        assert one.kept - other.kept == ((one.unit, one.language) == ("pair", failed[0].language))


def test_stopping_leaves_finished_sub_steps(bench: Any, run_evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = bench.context()
    ctx.stop = lambda: ctx.progress.done >= 14  # after the first model's pairs
    with pytest.raises(Stopped):
        run_evaluate(ctx)
    assert {p.name for p in ctx.folder.iterdir()} == {"loglik-before.parquet"}
    loads = Loads(monkeypatch)
    run_evaluate(bench.context())
    assert loads.models == ["digest-trained"]


class ScriptedEngine:
    """Answers "<role> n"; as a judge, prefers by `verdict(conversation)`."""

    context_length = 4096

    def __init__(self, renderer: Any, role: str, verdict: Any) -> None:
        self.renderer, self._role, self._verdict = renderer, role, verdict

    def stream(self, requests: Iterator[Request]) -> Iterator[Completion]:
        for request in requests:
            if not request.score_tokens:
                yield Completion(request.id, f"answer of {self._role}", [1], 1, "stop")
                continue
            text = self.renderer.tokenizer.decode(request.prompt_ids)
            p_a = self._verdict(text)
            tokens = self.renderer.tokenizer.get_vocab()
            logs = {tokens["A"]: float(torch.tensor(p_a).log()), tokens["B"]: float(torch.tensor(0.9 - p_a).log())}
            yield Completion(request.id, "", [], 0, "length", logs)


def after_is_first(text: str) -> bool:
    return text.index("answer of trained") < text.index("answer of initial")


@pytest.mark.parametrize(
    ("verdict", "rate", "consistency"),
    [
        (lambda text: 0.8 if after_is_first(text) else 0.1, 1.0, 1.0),  # the trained answer is better
        (lambda text: 0.1 if after_is_first(text) else 0.8, 0.0, 1.0),  # the initial one is
        (lambda text: 0.8, 0.5, 0.0),  # whatever comes first: inconsistent, a tie
        (lambda text: 0.45, 0.5, 1.0),  # both equally good in both orders
    ],
)
def test_win_rate_in_both_orders(
    bench: Any, run_evaluate: Any, monkeypatch: pytest.MonkeyPatch, verdict: Any, rate: float, consistency: float
) -> None:
    bench.models["evaluation_judge"] = replace(bench.models["evaluation_judge"], digest="digest-of-a-judge")

    def scripted(ctx: Any, role: str) -> Any:
        return ScriptedEngine(load_renderer(ctx.models[role], ctx.config.text), role, verdict)

    monkeypatch.setattr(answers_module, "shared_engine", scripted)
    result = run_evaluate(bench.context())
    row = result.value("after vs before", "test", "all", "win_rate")
    assert (row["value"], row["n"]) == (rate, 6)
    assert result.value("after vs before", "test", "all", "judge_consistency")["value"] == consistency
    assert result.value("after vs before", "test", "all", "judge_mass")["value"] == pytest.approx(0.9, abs=1e-6)


def test_a_judge_that_does_not_answer_the_question_is_left_out_aloud(
    bench: Any, run_evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(ScriptedEngine):
        def stream(self, requests: Iterator[Request]) -> Iterator[Completion]:
            for completion in super().stream(requests):
                yield replace(completion, score_logprobs={k: -20.0 for k in completion.score_logprobs})

    def scripted(ctx: Any, role: str) -> Any:
        return Silent(load_renderer(ctx.models[role], ctx.config.text), role, lambda text: 0.45)

    monkeypatch.setattr(answers_module, "shared_engine", scripted)
    ctx = bench.context()
    result = run_evaluate(ctx)
    rates = [row for row in result.evaluation if row["metric"].startswith("win_rate")]
    assert {(row["split"], row["n"], row["value"]) for row in rates} == {
        ("dev", 0, None),
        ("test", 0, None),
        ("unseen", 0, None),
    }
    assert any("no verdict on 10 of 10 prompts" in note for note in ctx.progress.notes)
    found = {(drop.unit, drop.reason, drop.failed) for drop in result.account.drops}
    assert found == {("comparison", "no_verdict", False)} and len(result.account.drops) == 10


def test_a_comparison_that_the_engine_failed_on_is_a_failure_and_no_verdict(
    bench: Any, run_evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(ScriptedEngine):
        def stream(self, requests: Iterator[Request]) -> Iterator[Completion]:
            for completion in super().stream(requests):
                if completion.id.endswith("/other_first"):
                    completion = replace(completion, score_logprobs={}, finish_reason="error", error="no memory")
                yield completion

    def scripted(ctx: Any, role: str) -> Any:
        return Failing(load_renderer(ctx.models[role], ctx.config.text), role, lambda text: 0.8)

    monkeypatch.setattr(answers_module, "shared_engine", scripted)
    result = run_evaluate(bench.context())
    assert {(d.unit, d.reason, d.detail, d.failed) for d in result.account.drops} == {
        ("comparison", "engine_error", "no memory", True)
    }
    compared = [t for t in result.account.tallies if t.unit == "comparison"]
    assert [(t.rows_in, t.kept, t.failed) for t in compared] == [(5, 0, 5), (5, 0, 5)]
    assert not [row for row in result.evaluation if row["metric"] == "judge_mass"]


def test_a_comparison_that_cannot_be_put_to_the_judge_is_dropped_before_it_is_asked(
    bench: Any, run_evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Counting(ScriptedEngine):
        def stream(self, requests: Iterator[Request]) -> Iterator[Completion]:
            for request in requests:
                asked.append(request.score_tokens)
                yield from super().stream(iter([request]))

    def scripted(ctx: Any, role: str) -> Any:
        return Counting(load_renderer(ctx.models[role], ctx.config.text), role, lambda text: 0.8)

    def unrendered(*_: Any) -> list[int]:
        raise RenderError("no such role")

    monkeypatch.setattr(answers_module, "shared_engine", scripted)
    for name, value, want in (
        ("_judge_context", lambda *_: 40, ("too_long_for_judge", False)),
        ("pairwise_ids", unrendered, ("cannot_render", True)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"stages.evaluate.winrate.{name}", value)
            result = run_evaluate(bench.context())
        assert {(d.unit, d.reason, d.failed) for d in result.account.drops} == {("comparison", *want)}
        assert len(result.account.drops) == 10
    assert not any(asked)


def test_the_label_says_when_the_policy_judges_itself(bench: Any, run_evaluate: Any) -> None:
    names = {row["metric"] for row in run_evaluate(bench.context("self")).evaluation}
    assert "win_rate_self_judged" in names and "win_rate" not in names
    bench.models["evaluation_judge"] = replace(bench.models["evaluation_judge"], digest="digest-of-a-judge")
    names = {row["metric"] for row in run_evaluate(bench.context("other")).evaluation}
    assert "win_rate" in names and "win_rate_self_judged" not in names


def test_a_missing_authored_file_is_refused(bench: Any, run_evaluate: Any) -> None:
    with pytest.raises(UserError, match="no file"):
        run_evaluate(bench.context(evaluate={"authored": [{"path": "/no/such/file.jsonl"}]}))


def test_nothing_is_measured_on_a_prompt_that_sft_learnt_from(bench: Any) -> None:
    """In any turn, whatever case and white space."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from schemas.tables import TABLES
    from stages.evaluate.heldout import HeldOut

    held_out = [row for row in bench.pairs if row["split"] == "test"]
    first, second = ([{**m, "content": f" {m['content'].upper()}"} for m in row["prompt"]] for row in held_out[:2])
    answer = [{"role": "assistant", "content": "ok"}]
    empty = {"conversation_id": "c", "language": "en", "n_tokens": 1, "n_learnt": 1, "source": "s", "source_row": 0}
    rows = [{**empty, "messages": first + answer + second + answer}, {**empty, "messages": second + answer}]
    path = bench.root / "conversations.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=TABLES["conversations"].schema), path)
    ctx = bench.context()
    ctx.inputs = {**ctx.inputs, "conversations": [path]}
    drops = HeldOut(ctx, load_renderer(bench.models["initial"], ctx.config.text)).drops
    found = {drop.row_id for drop in drops if drop.unit == "pair" and drop.reason == "in_training"}
    assert found == {row["pair_id"] for row in held_out[:2]}


def test_the_shipped_authored_pairs_can_be_read(bench: Any) -> None:
    from schemas.config.evaluation import EvaluateConfig
    from stages.evaluate.heldout import HeldOut

    ctx = bench.context(text={"max_length": 2048})
    ctx.config.evaluate = EvaluateConfig()
    held_out = HeldOut(ctx, load_renderer(bench.models["initial"], ctx.config.text))
    assert sum(pair.split == "authored" for pair in held_out.pairs) >= 24
