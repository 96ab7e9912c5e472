"""Judges without a rubric, judges that compare, and several judges at once: scores against independent computations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from engine_support import Scripted, joined, prompts, shards_of
from scipy.optimize import minimize

from schemas.errors import UserError
from schemas.ids import content_id
from schemas.tables import TABLES
from stages.contract import Context, ModelRef
from stages.engines import close_engines, shared_engine
from stages.engines.base import Completion
from stages.judge.bradley_terry import strengths
from stages.judge.stage import Judge

ASK = prompts(["What is water?", "Name a river."])
TRANSLATED = prompts(["Was ist Wasser?", "Nenne einen Fluss."], language="de")


def candidates(texts: list[str], asked: list[dict[str, Any]] = ASK) -> list[dict[str, Any]]:
    """Rows of the candidates table, answers to the prompts in turn."""
    return [
        {
            "candidate_id": content_id("candidate", number, text, asked[0]["language"]),
            "prompt_id": asked[number % len(asked)]["prompt_id"],
            "round": 0,
            "index": number // len(asked),
            "text": text,
            "n_tokens": 5,
            "finish_reason": "stop",
            "language": asked[0]["language"],
            "detected_language": asked[0]["language"],
            "language_confidence": 1.0,
        }
        for number, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A random classifier with two heads, and no padding id: what many reward models lack."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        id2label={0: "helpful", 1: "harmless"},
        label2id={"helpful": 0, "harmless": 1},
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-reward"
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> Path:
    """The tiny model, moved a little: a DPO-trained one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("models") / "trained"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def judging(make_context: Callable[..., Context], tmp_path: Path) -> Callable[..., Context]:
    """A context with the prompts in two languages; models by role."""

    def make(judge: dict[str, Any], rows: list[dict[str, Any]] = (), models: dict[str, Path] | None = None) -> Context:
        tables = {"prompts": [*ASK, *TRANSLATED], "candidates": list(rows)}
        for name, table in tables.items():
            pq.write_table(pa.Table.from_pylist(table, schema=TABLES[name].schema), tmp_path / f"{name}.parquet")
        inputs = {name: [tmp_path / f"{name}.parquet"] for name in tables}
        names = {"policy": "tiny", "judge": "judge", "dtype": "float32"}
        ctx = make_context(inputs=inputs, judge=judge, text={"max_length": 512}, model=names)
        ctx.models = ctx.models | {role: ModelRef(role, path, str(path)) for role, path in (models or {}).items()}
        return ctx

    return make


def scores(ctx: Context, rows: list[dict[str, Any]], size: int = 99) -> list[float]:
    parts = list(Judge().run(ctx, shards_of(rows, "candidates", size)))
    assert not [drop for part in parts for drop in part.drops]
    return [row["score"] for row in joined(parts, "judgements")]


class TestRewardModel:
    TEXTS = ("H2O.", "The Nile is a river in Africa, the longest of them.", "Steam and ice", "Rhine")

    def test_the_score_is_the_heads_logit_for_the_conversation_alone(
        self, judging: Callable[..., Context], reward_model: Path, tiny_tokenizer: Any
    ) -> None:
        """Float32, whatever shares its batch: 1e-5."""
        from transformers import AutoModelForSequenceClassification

        oracle = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
        rows = candidates(list(self.TEXTS))
        ctx = judging({"method": "reward_model", "head": "harmless"}, models={"judge": reward_model})
        found = scores(ctx, rows)
        for number, (row, score) in enumerate(zip(rows, found, strict=True)):
            talk = [*ASK[number % 2]["messages"], {"role": "assistant", "content": row["text"]}]
            ids = tiny_tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
            with torch.no_grad():
                assert score == pytest.approx(float(oracle(torch.tensor([ids])).logits[0, 1]), abs=1e-5)
        close_engines(ctx)

    def test_several_heads_need_a_choice_and_criteria_can_take_one_each_of_one_loaded_model(
        self, judging: Callable[..., Context], reward_model: Path
    ) -> None:
        rows = candidates(list(self.TEXTS))
        with pytest.raises(UserError, match="2 heads") as error:
            scores(judging({"method": "reward_model"}, models={"judge": reward_model}), rows)
        assert "0: helpful, 1: harmless" in error.value.fix
        with pytest.raises(UserError, match="no head 2"):
            scores(judging({"method": "reward_model", "head": 2}, models={"judge": reward_model}), rows)
        heads = {name: {"method": "reward_model", "head": name} for name in ("helpful", "harmless")}
        ctx = judging({"criteria": heads}, models={"judge": reward_model})
        (part,) = Judge().run(ctx, shards_of(rows, "candidates", 99))
        assert len(ctx.shared["engines"]) == 1
        found = {(r["candidate_id"], r["criterion"]): r["score"] for r in joined([part], "judgements")}
        assert len(found) == 2 * len(rows) and part.tallies[0].kept == len(rows)
        alone = scores(judging({"method": "reward_model", "head": 0}, models={"judge": reward_model}), rows)
        assert [found[row["candidate_id"], "helpful"] for row in rows] == pytest.approx(alone, abs=1e-5)
        assert ctx.progress.done == len(rows)

    def test_a_language_model_without_a_trained_head_is_no_reward_model(
        self, judging: Callable[..., Context], tiny_model: Path
    ) -> None:
        with pytest.raises(UserError, match=r"score\.weight"):
            scores(judging({"method": "reward_model"}, models={"judge": tiny_model}), candidates(["a", "b"]))

    def test_more_than_its_own_token_budget_is_a_drop(
        self, judging: Callable[..., Context], reward_model: Path
    ) -> None:
        ctx = judging({"method": "reward_model", "head": 0, "max_length": 64}, models={"judge": reward_model})
        (part,) = Judge().run(ctx, shards_of(candidates(["short", "long " * 90]), "candidates", 99))
        assert [(d.reason, d.detail.endswith("> 64")) for d in part.drops] == [("too_long_for_judge", True)]


class TestImplicitReward:
    def log_likelihood(self, folder: Path, tokenizer: Any, prompt: str, answer: str) -> float:
        """Independent: whole logits, float64."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder).double()
        asked = tokenizer(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)[
            "input_ids"
        ]
        said = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([asked + said])).logits[0].log_softmax(-1)
        return float(sum(logps[len(asked) + n - 1, token] for n, token in enumerate(said)))

    def test_it_is_beta_times_the_log_ratio(
        self, judging: Callable[..., Context], tiny_model: Path, trained: Path, tiny_tokenizer: Any
    ) -> None:
        rows = candidates(["H2O.", "The Nile, a long one", "x"])
        ctx = judging(
            {"method": "implicit_reward", "reference": "tiny", "beta": 0.3},
            models={"judge": trained, "judge_reference /": tiny_model},
        )
        for number, score in enumerate(scores(ctx, rows)):
            asked = ASK[number % 2]["messages"][0]["content"]
            own, reference = (
                self.log_likelihood(f, tiny_tokenizer, asked, rows[number]["text"]) for f in (trained, tiny_model)
            )
            assert score == pytest.approx(0.3 * (own - reference), abs=1e-4)

    def test_across_languages_the_answer_follows_the_english_prompt(
        self, judging: Callable[..., Context], tiny_model: Path, trained: Path, tiny_tokenizer: Any
    ) -> None:
        settings = {"method": "implicit_reward", "reference": "tiny", "cross_lingual": True, "beta": 1.0}
        models = {"judge": trained, "judge_reference /": tiny_model}
        rows = candidates(["Der Rhein"], TRANSLATED)
        own, reference = (
            self.log_likelihood(f, tiny_tokenizer, "What is water?", "Der Rhein") for f in (trained, tiny_model)
        )
        assert scores(judging(settings, models=models), rows) == pytest.approx([own - reference], abs=1e-3)

    def test_without_translation_groups_it_is_refused_by_name_and_a_prompt_without_one_leaves(
        self, judging: Callable[..., Context], tiny_model: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = {"method": "implicit_reward", "reference": "tiny", "cross_lingual": True}
        models = {"judge": trained, "judge_reference /": tiny_model}
        rows = candidates(["Der Rhein", "Wasser"], TRANSLATED)
        monkeypatch.setitem(TRANSLATED[1], "group_id", "alone")
        (part,) = Judge().run(judging(settings, models=models), shards_of(rows, "candidates", 99))
        assert [(d.row_id, d.reason) for d in part.drops] == [(rows[1]["candidate_id"], "no_english_prompt")]
        monkeypatch.setitem(TRANSLATED[0], "group_id", "alone too")
        with pytest.raises(UserError, match="translation into English") as error:
            scores(judging(settings, models=models), rows)
        assert "cross_lingual" in error.value.where

    def test_another_vocabulary_is_refused(self, judging: Callable[..., Context], tiny_model: Path, tmp_path: Path):
        import json
        import shutil

        other = tmp_path / "other"
        shutil.copytree(tiny_model, other)
        told = json.loads((other / "tokenizer.json").read_text())
        vocabulary = told["model"]["vocab"]
        one, two = list(vocabulary)[900:902]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
        (other / "tokenizer.json").write_text(json.dumps(told))
        models = {"judge": tiny_model, "judge_reference /": other}
        with pytest.raises(UserError, match="different vocabularies"):
            scores(judging({"method": "implicit_reward", "reference": "x"}, models=models), candidates(["a", "b"]))


class TestPairwise:
    """A judge that prefers the longer answer, or whatever is shown as A."""

    @pytest.fixture
    def run(self, judging: Callable[..., Context], tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
        def run(rows: list[dict[str, Any]], prefer: Callable[[str, str], bool], size: int = 99, **settings: Any):
            ctx = judging({"method": "pairwise", **settings}, rows, models={"judge": tiny_model})
            real = shared_engine(ctx, "judge")
            tokens = {
                letter: real.renderer.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB"
            }
            text = {row["candidate_id"]: row["text"] for row in rows}

            def answer(request: Any) -> Completion:
                first, second = request.id.split("/")[2].split(">")
                letter = "A" if prefer(text[first], text[second]) else "B"
                return Completion(request.id, "", [], 0, "length", {tokens[letter]: -0.05})

            engine = Scripted(real, answer)
            monkeypatch.setattr("stages.judge.stage.shared_engines", lambda ctx, wanted: [engine] * len(wanted))
            parts = list(Judge().run(ctx, shards_of(rows, "candidates", size)))
            return parts, engine, ctx

        return run

    ROWS = tuple(candidates(["aa", "b", "aaaa", "bbb", "a", "bb", "aaa", "bbbb"]))

    def test_wins_in_both_orders_make_the_ranking_of_each_prompt(self, run: Callable[..., Any]) -> None:
        parts, engine, ctx = run(list(self.ROWS), lambda a, b: len(a) > len(b))
        found = joined(parts, "judgements")
        of_first = [(row["score"], text) for row, text in zip(found[::2], ["aa", "aaaa", "a", "aaa"], strict=True)]
        assert [text for _, text in sorted(of_first)] == ["a", "aa", "aaa", "aaaa"]
        assert sum(score for score, _ in of_first) == pytest.approx(0, abs=1e-8)
        assert {row["consistency"] for row in found} == {1.0}
        assert all(row["mass"] == pytest.approx(np.exp(-0.05)) for row in found)
        assert len(engine.requests) == 2 * 2 * 6 and ctx.progress.done == len(self.ROWS)

    def test_a_judge_that_takes_what_comes_first_ties_everything_and_is_said_to(self, run: Callable[..., Any]) -> None:
        parts, _, _ = run(list(self.ROWS), lambda a, b: True)
        found = joined(parts, "judgements")
        assert [row["score"] for row in found] == pytest.approx([0.0] * len(found), abs=1e-9)
        assert {row["consistency"] for row in found} == {0.0}

    def test_a_prompt_in_two_shards_is_ranked_as_in_one(self, run: Callable[..., Any]) -> None:
        rows = sorted(self.ROWS, key=lambda row: row["prompt_id"])
        whole = joined(run(rows, lambda a, b: len(a) > len(b))[0], "judgements")
        cut = joined(run(rows, lambda a, b: len(a) > len(b), size=3)[0], "judgements")
        assert cut == whole

    def test_opponents_bound_the_comparisons_and_equal_texts_are_not_asked(self, run: Callable[..., Any]) -> None:
        rows = candidates([*["x" * n for n in range(1, 11)], "x", "xx"])
        _, engine, _ = run(rows, lambda a, b: len(a) > len(b), opponents=1)
        pairs = {frozenset(request.id.split("/")[2].split(">")) for request in engine.requests}
        assert (
            len(engine.requests) == 2 * len(pairs) == 2 * (2 * 6 - 2)
        )  # a circle of six each; x and xx meet themselves

    def test_a_lone_answer_has_no_opponent(self, run: Callable[..., Any]) -> None:
        parts, engine, _ = run(candidates(["one", "two"]), lambda a, b: True)
        assert [drop.reason for part in parts for drop in part.drops] == ["no_opponent"] * 2
        assert not engine.requests


def test_strengths_are_the_maximum_of_the_likelihood() -> None:
    """Against scipy's minimizer of the negative log-likelihood written out: 1e-5; ties are half a win each."""
    generator = np.random.default_rng(0)
    for n in (2, 3, 6):
        wins_NN = np.triu(generator.integers(0, 3, (n, n)) / 2.0, 1)
        wins_NN += np.tril(1.0 - wins_NN.T, -1)
        wins_NN = np.clip(wins_NN, 0, 1)

        def loss(s_N: np.ndarray, wins_NN: np.ndarray = wins_NN) -> float:
            gap_NN = s_N[:, None] - s_N[None, :]
            prior = 0.5 * (np.logaddexp(0, -s_N) + np.logaddexp(0, s_N)).sum()
            return float((wins_NN * np.logaddexp(0, -gap_NN)).sum() + prior)

        oracle = minimize(loss, np.zeros(n), method="BFGS", options={"gtol": 1e-9}).x
        assert strengths(wins_NN) == pytest.approx(oracle, abs=1e-5)


def test_a_panel_gives_rows_of_every_judge(
    judging: Callable[..., Context], reward_model: Path, tiny_model: Path
) -> None:
    panel = {
        "scorer": {"method": "expected_score", "min_mass": 0.0},
        "classifier": {"method": "reward_model", "head": 0, "model": "rm"},
    }
    rows = candidates(["a", "b", "c"])
    models = {"judge": tiny_model, "judge /classifier": reward_model}
    ctx = judging({"panel": panel}, models=models)
    found = joined(list(Judge().run(ctx, shards_of(rows, "candidates", 2))), "judgements")
    assert sorted({(row["judge"], row["method"], row["criterion"]) for row in found}, key=str) == [
        ("classifier", "reward_model", None),
        ("scorer", "expected_score", None),
    ]
    assert len(found) == 2 * len(rows)
    assert len(ctx.shared["engines"]) == 2
    close_engines(ctx)
    assert not ctx.shared["engines"]
