"""Reward models behind a server: /classify of a small server of our own, and of a real vLLM server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import engine_support
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_engine_openai import Server, run, serving

from schemas.errors import UserError
from schemas.tables import TABLES
from stages.contract import ModelRef
from stages.engines import close_engines
from stages.engines.openai_reward import OpenAIRewardEngine
from stages.engines.replies import Asked
from stages.engines.transformers_scores import RewardEngine
from stages.judge.stage import Judge
from stages.text.render import load_renderer


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> ModelRef:
    """A random classifier with two heads."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = {"id2label": {0: "helpful", 1: "harmless"}, "label2id": {"helpful": 0, "harmless": 1}}
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=2048, pad_token_id=0, **sizes, **labels)
    folder = tmp_path_factory.mktemp("models") / "tiny-reward"
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return ModelRef("tiny", folder, "reward")


@pytest.fixture
def connect(reward_model: ModelRef, make_config: Callable[..., Any]) -> Callable[[str], OpenAIRewardEngine]:
    def make(url: str) -> OpenAIRewardEngine:
        config = make_config(kind="openai", base_url=url, concurrency=3)
        return OpenAIRewardEngine(reward_model, config, load_renderer(reward_model, config.text))

    return make


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.models = [{"id": "tiny", "object": "model", "owned_by": "vllm", "max_model_len": 64}]
    server.respond = lambda body: (200, {"data": [{"probs": [float(len(body["input"])), -0.5]}]})
    yield server
    server.http.shutdown()


def test_whole_conversations_are_classified_without_an_activation(server: Server, connect, ask, tmp_path: Path) -> None:
    engine = connect(server.url)
    assert engine.labels == ("helpful", "harmless")
    long = replace(ask("long", "x"), prompt_ids=[5] * 64, whole=True)
    rows = [replace(ask(name, name * 3), whole=True) for name in "ab"]
    kept = Asked(engine, engine.tariff, lambda shard: tmp_path / str(shard))
    found = run(kept, long, *rows)
    assert found["long"].values == (64.0, -0.5), "it fills the context to the last token"
    assert [found[row.id].values[0] for row in rows] == [len(row.prompt_ids) for row in rows]
    assert all(body["use_activation"] is False and body["model"] == "tiny" for body in server.bodies)
    again = Asked(engine, engine.tariff, lambda shard: tmp_path / str(shard))
    assert run(again, *rows)["a"].values == found["a"].values and len(server.bodies) == 3
    assert kept.usage.written == 0 and kept.usage.read == 64 + sum(len(row.prompt_ids) for row in rows)


@pytest.mark.parametrize(
    "reply", [{"data": []}, {"data": [{"probs": [1.0]}]}, {"data": [{"probs": [1.0, float("nan")]}]}, {"data": 3}, "x"]
)
def test_a_reply_that_scores_nothing_is_a_failed_row(server: Server, connect, ask, reply: Any) -> None:
    server.respond = lambda body: (200, reply)
    (found,) = run(connect(server.url), replace(ask("a", "b"), whole=True)).values()
    assert found.finish_reason == "error" and "cannot be used" in found.error


def test_a_server_without_a_classifier_is_refused(server: Server, connect, ask) -> None:
    server.respond = lambda body: (404, {"error": {"message": "Not Found"}})
    with pytest.raises(UserError, match="does not classify"):
        run(connect(server.url), replace(ask("a", "b"), whole=True))
    server.models[0]["owned_by"] = "somebody"
    with pytest.raises(UserError, match="does not classify"):
        connect(server.url)


def test_the_judge_stage_reads_the_head_it_was_told_from_a_server(
    server: Server, tiny_model: Path, reward_model: ModelRef, tmp_path: Path
) -> None:
    """Beside a rubric judge on this machine, whose answers are nobody's to keep."""
    server.models[0] |= {"id": "rewards", "max_model_len": 2048}
    asks = engine_support.prompts(["What is water?", "Name a river."])
    answers = engine_support.answers(asks, ["H2O.", "Wet", "The Nile.", "Rhine"])
    inputs = {}
    for name, rows in (("prompts", asks), ("candidates", answers)):
        inputs[name] = [tmp_path / f"{name}.parquet"]
        pq.write_table(pa.Table.from_pylist(rows, schema=TABLES[name].schema), inputs[name][0])
    remote = {"kind": "openai", "base_url": server.url, "input_price": 2.0}
    criteria = {
        "harmless": {"method": "reward_model", "head": "harmless", "model": "rewards", "engine": remote},
        "helpful": {"method": "expected_score", "min_mass": 0.0},
    }
    ctx = engine_support.make_context(
        tiny_model, inputs=inputs, judge={"criteria": criteria}, text={"max_length": 1024}, execution={"device": "cpu"}
    )
    ctx.models = {**ctx.models, "judge harmless/": replace(reward_model, name="rewards")}
    ctx.unfinished = lambda shard: tmp_path / f"unfinished-{shard}"
    (part,) = Judge().run(ctx, engine_support.shards_of(answers, "candidates", 9))
    close_engines(ctx)
    scores = {row["criterion"]: [] for row in part.tables["judgements"].to_pylist()}
    for row in part.tables["judgements"].to_pylist():
        scores[row["criterion"]].append(row["score"])
    assert scores["harmless"] == [-0.5] * 4 and len(scores["helpful"]) == 4
    read = sum(len(body["input"]) for body in server.bodies)
    assert part.stats["cost"] == pytest.approx(2.0 * read / 1e6) and part.stats["prompt_tokens"] > read
    assert len((tmp_path / "unfinished-0").read_text().split()) and len(server.bodies) == 4


def test_a_conversation_that_fills_the_context_is_rewarded(
    reward_model: ModelRef, make_config: Callable[..., Any], ask
) -> None:
    """Nothing is written after it, so that no room is kept; one token more is refused."""
    config = make_config()
    engine = RewardEngine(reward_model, config, load_renderer(reward_model, config.text))
    rows = [replace(ask(str(n), "x"), prompt_ids=[5] * n, whole=True) for n in (2048, 2049)]
    found = run(engine, *rows)
    assert engine.context_length == 2048 and len(found["2048"].values) == 2
    assert "exceed the context" in found["2049"].error


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="the vllm package is not installed")
@pytest.mark.skipif("CONGRAD_LONG" not in os.environ, reason="a server takes half a minute to start: CONGRAD_LONG=1")
def test_a_real_vllm_server_gives_the_logits_of_transformers(
    reward_model: ModelRef, connect, make_config: Callable[..., Any], ask
) -> None:
    """To 1e-4, in float32."""
    assert reward_model.path is not None
    with serving(reward_model.path, "--runner", "pooling") as url:
        engine = connect(url)
        rows = [replace(ask(str(n), "word " * (n + 1)), whole=True) for n in range(5)]
        local = RewardEngine(reward_model, make_config(), engine.renderer)
        ours, theirs = run(engine, *rows), run(local, *rows)
    for row in rows:
        assert ours[row.id].values == pytest.approx(theirs[row.id].values, abs=1e-4)
