"""The transformers engine: rows do not depend on their batch, and end where they should."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import Context, ModelRef, Progress
from stages.engines import shared_engine
from stages.engines.base import Completion, Engine, Request
from stages.engines.transformers import TransformersEngine
from stages.text.render import Renderer


@pytest.fixture
def engine(model: ModelRef, make_config: Callable[..., RunConfig], renderer: Renderer) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(model, make_config(), renderer)
    yield engine
    engine.close()


def run(engine: Engine, *requests: Request) -> dict[str, Completion]:
    found = list(engine.stream(iter(requests)))
    assert len(found) == len(requests)
    return {completion.id: completion for completion in found}


def reference(model: ModelRef) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)


def test_greedy_equals_one_token_at_a_time(engine: TransformersEngine, model: ModelRef, ask) -> None:
    requests = [ask(f"r{i}", "hello " * (1 + 4 * i), temperature=0) for i in range(3)]
    found = run(engine, *requests)
    oracle = reference(model)
    for request in requests:
        ids = list(request.prompt_ids)
        with torch.no_grad():
            for _ in range(12):
                ids.append(int(oracle(torch.tensor([ids])).logits[0, -1].argmax()))
        assert found[request.id].token_ids == ids[len(request.prompt_ids) :]
        assert found[request.id].finish_reason == "length"


def test_a_row_does_not_depend_on_its_batch(engine: TransformersEngine, ask) -> None:
    rows = [ask(f"r{i}", "word " * (1 + 3 * i), seed=100 + i, temperature=1.0) for i in range(7)]
    together = run(engine, *rows)
    assert together == run(engine, *reversed(rows))
    for row in rows:
        assert run(engine, row)[row.id] == together[row.id]


def test_seeds_decide_and_differ(engine: TransformersEngine, ask) -> None:
    found = run(engine, *(ask(f"s{seed}", "hi", seed=seed, temperature=1.5) for seed in (0, 1, 2, 2**63 - 1)))
    assert len({completion.text for completion in found.values()}) == 4


def test_each_row_has_its_own_limits(engine: TransformersEngine, ask) -> None:
    found = run(engine, ask("short", "hi", max_tokens=3, temperature=0), ask("long", "hi", max_tokens=9, temperature=0))
    assert (found["short"].n_tokens, found["long"].n_tokens) == (3, 9)
    assert found["long"].token_ids[:3] == found["short"].token_ids


def test_a_stop_string_ends_the_answer_and_is_cut(engine: TransformersEngine, ask) -> None:
    free = run(engine, ask("f", "hi there", temperature=0, max_tokens=20))["f"]
    stop = free.text[4:7]
    assert len(stop) == 3
    stopping = ask("f", "hi there", temperature=0, max_tokens=20, stop=[stop, "never this"])
    neighbour = ask("g", "other", seed=3)
    found = run(engine, stopping, neighbour)
    assert found["f"].text == free.text[: free.text.index(stop)]
    assert found["f"].finish_reason == "stop"
    assert 0 < found["f"].n_tokens < 20
    assert found["f"].token_ids == free.token_ids[: found["f"].n_tokens]
    assert found["g"] == run(engine, neighbour)["g"]


def test_the_end_of_turn_token_ends_and_counts(
    model: ModelRef, make_config: Callable[..., RunConfig], renderer: Renderer, ask
) -> None:
    engine = TransformersEngine(model, make_config(), renderer)
    free = run(engine, ask("a", "hello", temperature=0))["a"]
    engine._stop_ids = [free.token_ids[4]]
    first = free.token_ids.index(free.token_ids[4])
    ended = run(engine, ask("a", "hello", temperature=0), ask("b", "something else", temperature=0))["a"]
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[: first + 1]
    assert ended.n_tokens == first + 1


def test_scores_are_the_log_softmax_at_the_last_position(engine: TransformersEngine, model: ModelRef, ask) -> None:
    rows = [ask(f"s{i}", "text " * (1 + 2 * i), score=(5, 17, 900)) for i in range(3)]
    found = run(engine, *rows)
    oracle = reference(model)
    for row in rows:
        with torch.no_grad():
            want = oracle(torch.tensor([row.prompt_ids])).logits[0, -1].double().log_softmax(-1)
        assert found[row.id].n_tokens == 0
        for token, logprob in found[row.id].score_logprobs.items():
            assert logprob == pytest.approx(float(want[token]), abs=1e-4)


def test_batches_do_not_mix_groups_or_kinds(engine: TransformersEngine, ask, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[str]] = []
    whole = engine.run_batch

    def spy(batch: list[Request]) -> Iterator[Completion]:
        batches.append([request.id for request in batch])
        return whole(batch)

    monkeypatch.setattr(engine, "run_batch", spy)
    rows = [ask(f"{group}{i}", "x", group=group) for group in (0, 1) for i in range(6)]
    run(engine, *rows, ask("score", "x", score=(5,), group=1))
    assert batches == [["00", "01", "02", "03"], ["04", "05"], ["10", "11", "12", "13"], ["14", "15"], ["score"]]


def test_requests_are_pulled_as_there_is_room(engine: TransformersEngine, ask) -> None:
    pulled = []

    def requests() -> Iterator[Request]:
        for i in range(40):
            pulled.append(i)
            yield ask(str(i), "x", max_tokens=1)

    stream = engine.stream(requests())
    next(stream)
    assert len(pulled) <= 5


def test_a_request_beyond_the_context_is_an_error_and_not_cut(engine: TransformersEngine, ask) -> None:
    huge = Request("huge", [5] * engine.context_length, ask("x", "x").sampling, 0)
    found = run(engine, huge, ask("ok", "hi"))
    assert found["huge"].finish_reason == "error"
    assert str(engine.context_length) in found["huge"].error
    assert found["ok"].finish_reason in ("stop", "length")


def test_a_folder_without_weights_is_a_clear_error(
    tmp_path: Path, make_config: Callable[..., RunConfig], renderer: Renderer
) -> None:
    with pytest.raises(UserError, match="gone cannot be loaded"):
        TransformersEngine(ModelRef("gone", tmp_path, ""), make_config(), renderer)


def test_one_engine_is_kept_until_another_model_is_needed(
    model: ModelRef, make_config: Callable[..., RunConfig], progress: Progress
) -> None:
    other = ModelRef("other", model.path, "another digest")
    ctx = Context(make_config(), 0, {}, {"policy": model, "judge": model, "evaluation_judge": other}, progress)
    first = shared_engine(ctx, "policy")
    assert shared_engine(ctx, "judge") is first
    second = shared_engine(ctx, "evaluation_judge")
    assert second is not first
    assert not hasattr(first, "_model"), "the first engine was closed"


def test_a_batch_that_does_not_fit_is_halved_and_remembered_and_answers_stay_the_same(
    model: ModelRef, make_config: Callable[..., RunConfig], renderer: Renderer, progress, ask, monkeypatch
) -> None:
    rows = [ask(f"r{i}", "word " * (1 + 3 * i), seed=100 + i, temperature=1.0) for i in range(9)]
    whole = run(TransformersEngine(model, make_config(), renderer), *rows)
    ctx = Context(make_config(), 0, {}, {}, progress)
    engine = TransformersEngine(model, ctx.config, renderer, ctx)
    generate, sizes = engine._model.generate, []

    def small(**arguments):
        sizes.append(len(arguments["input_ids"]))
        if sizes[-1] > 2 or arguments["input_ids"].shape[1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return generate(**arguments)

    monkeypatch.setattr(engine._model, "generate", small)
    found = run(engine, *rows)
    lengths = {row.id: len(row.prompt_ids) for row in rows}
    assert any(length > 40 for length in lengths.values())
    for name, completion in found.items():
        if lengths[name] <= 40:
            assert completion == whole[name]
        else:
            assert completion.finish_reason == "error" and "do not fit in memory" in completion.error
    assert ctx.limits == {"engine.batch_size": 1} or ctx.limits == {"engine.batch_size": 2}
    assert any("engine.batch_size is 2 from here on" in note for note in progress.notes)
    assert sizes[0] == 4 and sizes.count(4) == 1, "what was learnt is kept"


def test_reference_mode_refuses_to_change_its_batches(
    model: ModelRef, make_config: Callable[..., RunConfig], renderer: Renderer, ask, monkeypatch
) -> None:
    engine = TransformersEngine(model, make_config(execution={"deterministic": True}), renderer)

    def full(**arguments):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(engine._model, "generate", full)
    with pytest.raises(UserError, match=r"batch of 2 requests.*engine\.batch_size"):
        run(engine, ask("a", "x"), ask("b", "y"))


def test_logits_that_are_not_numbers_fail_their_row_and_no_other(
    engine: TransformersEngine, renderer: Renderer, ask
) -> None:
    """One token's embedding is damaged, or overflows: nothing is drawn from what is no distribution."""
    good, bad = ask("good", "hello there", temperature=1.0), ask("bad", "hello zebra", temperature=1.0)
    (token, *_) = set(bad.prompt_ids) - set(good.prompt_ids)
    alone = run(engine, good)["good"]
    scores = Request("score", bad.prompt_ids, bad.sampling, 1, score_tokens=(5, 6))
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            engine._model.get_input_embeddings().weight[token] = value
        found = run(engine, good, bad)
        assert found["good"] == alone
        assert found["bad"].finish_reason == "error" and "not finite" in found["bad"].error
        assert found["bad"].text == ""
        assert run(engine, scores)["score"].finish_reason == "error"
