"""vLLM, on the tiny model, against the transformers engine in float32."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from engine_support import joined, make_context, prompts, shards_of

from benchmarks.tiny_models import tiny_config
from benchmarks.tiny_models import tiny_model as random_model
from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import Context, ModelRef, Part, Shard
from stages.engines.base import Completion, Engine, Request
from stages.engines.transformers import TransformersEngine
from stages.engines.vllm import VllmEngine
from stages.generate.stage import Generate
from stages.text.render import Renderer

GREEDY = {"candidates": 2, "sampling": {"temperature": 0, "max_tokens": 12}}
ROWS = prompts([f"Tell me about the number {n}" for n in range(24)])


@dataclass
class Generated:
    """What generate made while its engine's process was killed; the engine that was started instead."""

    ctx: Context
    parts: list[Part]
    killed: int | None

    @property
    def engine(self) -> Any:
        return next(iter(self.ctx.shared["engines"].values()))


@pytest.fixture(scope="module")
def generated(tiny_model: Path) -> Iterator[Generated]:
    """The real thing: SIGKILL to the engine's process while shards are in flight. One engine more serves all tests."""
    engine = {"max_num_seqs": 4, "enforce_eager": True, "cpu_kv_cache_gib": 1, "gpu_memory_utilization": 0.2}
    ctx = make_context(tiny_model, engine=engine, generate=GREEDY, execution={}, text={"max_length": 256})
    made = Generated(ctx, [], None)

    def shards() -> Iterator[Shard]:
        for shard in shards_of(ROWS, "prompts", 6):
            if shard.index == 2:
                made.killed = made.engine.pid
                os.kill(made.killed, signal.SIGKILL)
            yield shard

    made.parts = list(Generate().run(ctx, shards()))
    yield made
    made.engine.close()


@pytest.fixture
def vllm_engine(generated: Generated) -> Engine:
    return generated.engine


def run(engine: Engine, *requests: Request) -> dict[str, Completion]:
    found = list(engine.stream(iter(requests)))
    assert len(found) == len(requests)
    return {completion.id: completion for completion in found}


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="the vllm package is not installed")
class TestVllm:
    def test_greedy_and_scores_equal_transformers(
        self, vllm_engine: Engine, model: ModelRef, make_config: Callable[..., RunConfig], renderer: Renderer, ask
    ) -> None:
        rows = [ask(f"g{i}", "word " * (i + 1), temperature=0) for i in range(10)]
        rows += [ask("score", "rate this", score=(5, 17, 900))]
        other = TransformersEngine(model, make_config(), renderer)
        ours, theirs = run(vllm_engine, *rows), run(other, *rows)
        for row in rows[:-1]:
            assert ours[row.id] == theirs[row.id]
        assert ours["score"].score_logprobs == pytest.approx(theirs["score"].score_logprobs, abs=1e-4)
        assert set(ours["score"].score_logprobs) == {5, 17, 900}
        assert ours["score"].n_tokens == 0

    def test_a_seed_decides_its_row_whatever_else_is_running(self, vllm_engine: Engine, ask) -> None:
        rows = [ask(f"s{i}", "hi", seed=2**62 + i, temperature=1.5) for i in range(6)]
        together = run(vllm_engine, *rows)
        assert len({completion.text for completion in together.values()}) == 6
        assert run(vllm_engine, rows[3])["s3"] == together["s3"]

    def test_more_prompt_tokens_than_a_step_takes_do_not_end_a_seeded_draw(self, vllm_engine: Engine, ask) -> None:
        """vLLM's CPU generators cannot take back the token that a prompt cut in two draws: no prompt is cut."""
        length = vllm_engine.context_length - 4
        ids = [[5 + (7 * n + i * (n + 1)) % 90 for i in range(length)] for n in range(12)]
        sampling = ask("x", "x", max_tokens=2, temperature=1.0).sampling
        got = run(vllm_engine, *(Request(f"r{n}", ids[n], sampling, n) for n in range(12)))
        assert {completion.finish_reason for completion in got.values()} <= {"stop", "length"}

    def test_stop_strings_are_cut(self, vllm_engine: Engine, ask) -> None:
        free = run(vllm_engine, ask("f", "hi there", temperature=0, max_tokens=20))["f"]
        stop = free.text[4:7]
        found = run(vllm_engine, ask("f", "hi there", temperature=0, max_tokens=20, stop=[stop]))["f"]
        assert (found.text, found.finish_reason) == (free.text[: free.text.index(stop)], "stop")

    def test_a_request_beyond_the_context_is_an_error_and_not_cut(self, vllm_engine: Engine, ask) -> None:
        huge = Request("huge", [5] * vllm_engine.context_length, ask("x", "x").sampling, 0)
        found = run(vllm_engine, huge, ask("ok", "hi"))
        assert found["huge"].finish_reason == "error"
        assert found["ok"].finish_reason in ("stop", "length")

    def test_requests_are_pulled_lazily_and_an_abandoned_stream_leaves_nothing_behind(
        self, vllm_engine: Engine, ask
    ) -> None:
        pulled = []

        def requests() -> Iterator[Request]:
            for i in range(100):
                pulled.append(i)
                yield ask(str(i), "x", max_tokens=2)

        stream = vllm_engine.stream(requests())
        next(stream)
        assert len(pulled) <= 24
        stream.close()
        assert run(vllm_engine, ask("after", "y"))["after"].finish_reason in ("stop", "length")

    def test_a_process_killed_in_the_middle_of_generate_loses_nothing(
        self, generated: Generated, tiny_model: Path
    ) -> None:
        """Greedy answers equal transformers', but for a character that the last token leaves unfinished."""
        parts, notes = generated.parts, generated.ctx.progress.notes  # type: ignore[attr-defined]
        assert generated.killed and generated.engine.pid not in (None, generated.killed)
        assert sorted(part.index for part in parts) == [0, 1, 2, 3]
        assert sum(t.kept for part in parts for t in part.tallies) == 24 and not any(part.drops for part in parts)
        assert any("SIGKILL" in note and "asked again" in note for note in notes)
        other = make_context(tiny_model, generate=GREEDY, text={"max_length": 256})
        whole = list(Generate().run(other, shards_of(ROWS, "prompts", 6)))
        ours, theirs = joined(parts, "candidates"), joined(whole, "candidates")
        assert [(c["prompt_id"], c["index"]) for c in ours] == [(c["prompt_id"], c["index"]) for c in theirs]
        assert [c["text"].rstrip("\ufffd") for c in ours] == [c["text"].rstrip("\ufffd") for c in theirs]


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="the vllm package is not installed")
def test_a_multimodal_wrapper_answers_without_its_processor(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """One of those whose code vLLM's CPU build can load without torchvision."""
    config = tiny_config("idefics3")
    own = {"vocab_size": 1024, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 256, "head_dim": 32}
    for part, (field, value) in product((config, config.get_text_config()), own.items()):
        setattr(part, field, value)
    made = random_model(config)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = 2, 0
    made.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    engine = {"kind": "vllm", "max_num_seqs": 4, "enforce_eager": True, "cpu_kv_cache_gib": 1}
    answers = []
    for sections in ({"engine": engine, "execution": {}}, {}):
        ctx = make_context(tmp_path, generate=GREEDY, text={"max_length": 256}, **sections)
        answers.append(joined(list(Generate().run(ctx, shards_of(ROWS[:4], "prompts", 4))), "candidates"))
        for made_engine in ctx.shared["engines"].values():
            made_engine.close()
    ours, theirs = ([c["text"].rstrip("\ufffd") for c in each] for each in answers)
    assert ours == theirs and len(ours) == 8


def test_without_the_package_the_error_says_what_to_do(
    model: ModelRef, make_config: Callable[..., RunConfig], renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.engines.vllm.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"engine\.kind: transformers"):
        VllmEngine(model, make_config(kind="vllm"), renderer)


def test_vllm_stops_at_logits_that_are_not_numbers() -> None:
    """It would draw from them; it is told to raise, and what it raises becomes the reason of the stop."""
    from stages.engines.vllm import VllmEngine

    class Core:
        def step(self) -> None:
            raise RuntimeError("NaNs detected in logits: {'a': 3}")

    engine = VllmEngine.__new__(VllmEngine)
    engine._name, engine._dtype = "mine", "auto"
    with pytest.raises(UserError, match=r"logits of mine are not finite .* in bfloat16"):
        engine._step(Core())
