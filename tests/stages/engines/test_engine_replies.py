"""A server is asked each question once: replies are kept as they come, over deaths of server and process; what is asked is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_support
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from engine_support import joined, make_context, prompts, shards_of
from test_engine_openai import Server, run

from schemas.errors import UserError
from schemas.tables import TABLES
from stages.contract import Left, Shard, Share
from stages.engines import close_engines
from stages.engines.base import Engine, Request, Tariff
from stages.engines.openai import OpenAIEngine
from stages.engines.pace import Pace
from stages.engines.replies import Asked, Usage, asked, tell_cost
from stages.generate.stage import Generate
from stages.judge.stage import Judge


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()


@pytest.fixture
def connect(model: Any, make_config: Callable[..., Any], renderer: Any) -> Callable[..., OpenAIEngine]:
    def make(url: str, **engine: Any) -> OpenAIEngine:
        config = make_config(**{"kind": "openai", "base_url": url, "concurrency": 3, **engine})
        return OpenAIEngine(model, config, renderer)

    return make


def keeping(engine: Engine, folder: Path) -> Asked:
    assert engine.tariff is not None
    return Asked(engine, engine.tariff, lambda shard: folder / f"unfinished-{shard}")


def test_a_reply_that_is_kept_is_the_same_and_is_not_asked_for_again(
    server: Server, connect, ask, tmp_path: Path
) -> None:
    requests = [ask("a", "one", seed=1), ask("b", "two", seed=2, group=1), ask("s", "rate", score=(5, 17))]
    logprobs = {"tokens": ["x"], "token_logprobs": [-0.1], "top_logprobs": [{"x": -0.1}], "text_offset": [0]}

    def respond(body: dict[str, Any]) -> tuple[int, Any]:
        status, reply = Server.echo(body)
        if body.get("logprobs"):
            reply["choices"][0]["logprobs"] = logprobs
        return status, reply

    server.respond = respond
    first = keeping(connect(server.url), tmp_path)
    before = run(first, *requests)
    assert (first.usage.requests, first.known, len(server.bodies)) == (3, 0, 3)
    assert first.usage.written == 3 + 3 + 1  # a score is a token written
    again = keeping(connect(server.url), tmp_path)
    renamed = [Request(f"other {r.id}", r.prompt_ids, r.sampling, r.seed, r.score_tokens, r.group) for r in requests]
    after = run(again, *renamed)
    assert {id.removeprefix("other "): c.text for id, c in after.items()} == {id: c.text for id, c in before.items()}
    assert after["other s"].score_logprobs == before["s"].score_logprobs
    assert (again.usage.requests, again.known, len(server.bodies)) == (0, 3, 3)
    assert "3 more were answered before" in again.told()


@pytest.mark.parametrize("change", ["seed", "text", "sampling", "server", "shard"])
def test_another_question_is_asked(server: Server, connect, ask, tmp_path: Path, change: str) -> None:
    run(keeping(connect(server.url), tmp_path), ask("a", "one", seed=1))
    engine = keeping(connect(server.url), tmp_path)
    request = ask(
        "a",
        "two" if change == "text" else "one",
        seed=2 if change == "seed" else 1,
        group=1 if change == "shard" else 0,
        **({"temperature": 0.3} if change == "sampling" else {}),
    )
    if change == "server":
        engine.tariff = Tariff("another")
    run(engine, request)
    assert (engine.usage.requests, engine.known) == (1, 0)


def test_errors_and_lines_that_were_cut_are_not_replies(server: Server, connect, ask, tmp_path: Path) -> None:
    requests = [ask(f"r{n}", f"text {n}", seed=n) for n in range(4)]
    server.respond = lambda body: (400, {"error": {"message": "no"}}) if body["seed"] == 3 else Server.echo(body)
    found = run(keeping(connect(server.url, requests_per_minute=6000), tmp_path), *requests)
    assert found["r3"].finish_reason == "error"
    kept = tmp_path / "unfinished-0"
    kept.write_bytes(kept.read_bytes()[:-20] + b"\n\xff\xfe\n[1]\nnull\n")
    server.respond = Server.echo
    again = keeping(connect(server.url), tmp_path)
    assert all(c.finish_reason == "stop" for c in run(again, *requests).values())
    assert (again.known, again.usage.requests) == (2, 2)


def test_what_it_costs_is_counted_by_the_prices(server: Server, connect, ask, tmp_path: Path) -> None:
    engine = keeping(connect(server.url, input_price=2.5, output_price=10.0), tmp_path)
    request = ask("a", "one two three")
    run(engine, request)
    n = len(request.prompt_ids)
    assert engine.usage == Usage(1, n, 3)
    assert engine.usage.cost(engine.tariff) == pytest.approx((2.5 * n + 10.0 * 3) / 1e6)
    assert "by engine.input_price" in engine.told()
    assert "price" not in keeping(connect(server.url), tmp_path).told()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Only sleeping moves it, and waiting for an answer does not."""
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    for module in ("openai", "pace"):
        monkeypatch.setattr(f"stages.engines.{module}.time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr("stages.engines.openai.wait", lambda running, seconds, when: wait(running, None, when))
    return now


@pytest.mark.parametrize("fails", [False, True])
def test_requests_begin_no_faster_than_asked_retries_too(
    server: Server, connect, ask, clock: list[float], fails: bool
) -> None:
    """30 a minute: one every two seconds; where the server says no to each one's first attempt, ten are sent."""
    begun: list[float] = []

    def respond(body: dict[str, Any]) -> tuple[int, Any]:
        begun.append(clock[0])
        return (429, {"error": {"message": "too fast"}}) if fails and len(begun) % 2 else Server.echo(body)

    server.respond = respond
    found = run(
        connect(server.url, requests_per_minute=30, concurrency=1 if fails else 3),
        *[ask(f"r{n}", "x", seed=n) for n in range(2 if fails else 5)],
    )
    assert begun == [100.0 + 2 * n for n in range(4 if fails else 5)]
    assert all(one.finish_reason == "stop" for one in found.values())


def test_workers_share_the_pace_from_their_first_request_on(clock: list[float]) -> None:
    """Three workers, 30 a minute; a fourth comes: whoever has heard of it slows down."""
    shares = [Share(n, 3) for n in range(3)]
    paces = [Pace(30, lambda n=n: shares[n]) for n in range(3)]
    sent = sorted(100.0 + pace.seconds + pace.interval * k for pace in paces for k in range(4))
    assert sent == [100.0 + 2 * n for n in range(12)]
    shares[0] = Share(0, 4)
    assert [pace.interval for pace in paces] == [8.0, 6.0, 6.0]
    assert [paces[0].begin(), paces[0].begin()] == [0.0, 8.0]
    assert Pace(None, lambda: shares[1]).seconds == 0.0


class Mortal(Server):
    """Answers `left` requests more, and then refuses all."""

    def __init__(self) -> None:
        super().__init__()
        self.answered: list[tuple[Any, ...]] = []
        self.left = 0
        self.respond = self.live

    def live(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            self.left -= 1
            if self.left < 0:
                return 401, {"error": {"message": "gone"}}
            self.answered.append((tuple(body["prompt"]), body["seed"]))
        status, reply = self.echo(body)
        reply["choices"][0]["text"] = "Because. Score: 3"
        return status, reply


@pytest.fixture
def mortal() -> Iterator[Mortal]:
    server = Mortal()
    yield server
    server.http.shutdown()


@pytest.mark.parametrize("stage", [Generate, Judge])
def test_a_server_that_dies_in_the_middle_is_asked_nothing_twice(
    mortal: Mortal, tiny_model: Path, tmp_path: Path, stage: type[Generate] | type[Judge]
) -> None:
    """In shards of 4 rows; it dies after 3 requests, and after 2 more; processes are new each time."""
    asks = prompts([f"Question {n}?" for n in range(6)])
    answers = engine_support.answers(asks, [f"Answer {n}" for n in range(12)])
    inputs = {}
    for name, rows in (("prompts", asks), ("candidates", answers)):
        inputs[name] = [tmp_path / f"{name}.parquet"]
        pq.write_table(pa.Table.from_pylist(rows, schema=TABLES[name].schema), inputs[name][0])
    table, rows = ("prompts", asks) if stage is Generate else ("candidates", answers)
    prices = {"input_price": 1.0, "output_price": 1.0}
    for left in (3, 2, 99):
        mortal.left = left
        ctx = make_context(
            tiny_model,
            inputs=inputs,
            text={"max_length": 1024},
            execution={"device": "cpu"},
            engine={"kind": "openai", "base_url": mortal.url, "concurrency": 2, **prices},
            generate={"candidates": 2, "sampling": {"max_tokens": 8}},
            judge={"method": "additive", "sampling": {"max_tokens": 8}},
        )
        ctx.unfinished = lambda shard: tmp_path / "state" / f"unfinished-{shard}"
        try:
            parts = list(stage().run(ctx, shards_of(rows, table, 4)))
        except UserError as error:
            assert "refuses the key" in str(error) and left < 99
        finally:
            close_engines(ctx)
    assert len(mortal.answered) == len(set(mortal.answered)) == 12
    found = joined(parts, "candidates" if stage is Generate else "judgements")
    assert [row["text"] if stage is Generate else row["score"] for row in found] == [
        "Because. Score: 3" if stage is Generate else 3.0
    ] * 12
    assert all(part.stats["cost"] > 0 for part in parts)
    before, after = ctx.progress.notes[-2:]
    left = (
        7 if stage is Generate else 8
    )  # what is kept of the first shard is known, of the second about as much as of the first is left
    assert f"asked about {left} times" in before and "at most" in before
    assert "answered 7 requests" in after and "5 more were answered before" in after


def test_what_a_run_is_left_with_is_said_before_its_first_request_whichever_shard_that_is(
    server: Server, connect, ask, tmp_path: Path
) -> None:
    ctx, engine = make_context(tmp_path), keeping(connect(server.url), tmp_path)
    ctx.left = Left(first=3, rows=30)
    rows = pa.table({"prompt_id": ["a", "b"]})
    requests = [ask(f"r{n}", "x", seed=n) for n in range(4)]
    for index in (4, 3, 5):
        tell_cost(ctx, "prompts", Shard(index, rows), {engine: requests})
    (note,) = ctx.progress.notes
    assert "asked about 60 times" in note, "two a row"


def test_engines_that_compute_here_and_samples_are_left_as_they_are(server: Server, connect, tmp_path: Path) -> None:
    engine, ctx = connect(server.url), make_context(tmp_path)
    assert asked(engine, ctx) is engine
    ctx.unfinished = lambda shard: tmp_path / str(shard)
    assert isinstance(asked(engine, ctx), Asked)
