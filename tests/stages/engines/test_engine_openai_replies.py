"""Whatever a server answers is a failed row or a clear stop, of bounded size and time, and never takes the key with it."""

from __future__ import annotations

import gzip
import json
import math
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import ModelRef
from stages.engines import openai_wire
from stages.engines.base import Completion, Request
from stages.engines.openai import OpenAIEngine
from stages.text.render import Renderer

MODELS = {"object": "list", "data": [{"id": "tiny", "owned_by": "vllm", "max_model_len": 2048}]}
KEY = "canary-key-in-the-environment"


class Raw:
    """Answers every POST with the bytes of `reply`, every GET with those of `models`, as they are."""

    def __init__(self) -> None:
        self.reply: bytes | Iterator[bytes] = b""
        self.models = http(MODELS)
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    byte = self.rfile.read(1)
                    if not byte:
                        return
                    head += byte
                length = next(
                    (int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length")), 0
                )
                self.rfile.read(length)
                answer = outer.models if head.startswith(b"GET") else outer.reply
                try:
                    for chunk in [answer] if isinstance(answer, bytes) else answer:
                        self.wfile.write(chunk)
                except OSError:
                    return

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def http(body: Any, status: str = "200 OK", *headers: str, raw: bytes | None = None) -> bytes:
    data = json.dumps(body).encode() if raw is None else raw
    lines = [
        f"HTTP/1.1 {status}",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def reply(choice: Any = None, **fields: Any) -> dict[str, Any]:
    """A good reply with parts replaced; ... leaves a part out."""
    good = {"index": 0, "text": "hello", "finish_reason": "stop", "token_ids": [3, 4]}
    good["logprobs"] = {"top_logprobs": [{"token_id:3": -0.5}]}
    body = {"id": "x", "choices": [good | (choice or {})], "usage": {"completion_tokens": 2}} | fields
    body["choices"] = [c if not isinstance(c, dict) else {k: v for k, v in c.items() if v is not ...} for c in body["choices"]] if isinstance(body["choices"], list) else body["choices"]  # fmt: skip
    return {key: value for key, value in body.items() if value is not ...}


WRONG: list[Any] = [None, 1, -1, 1.5, "x", "", True, [], {}, [None], [[]], {"a": 1}]
BODIES: dict[str, bytes] = {
    **{f"body {value!r}": http(value) for value in WRONG},
    **{f"choices {value!r}": http(reply(choices=value)) for value in (..., *WRONG)},
    **{f"usage {value!r}": http(reply(usage=value)) for value in (1, "x", [], True, [{}])},
    **{f"counted {value!r}": http(reply(usage={"completion_tokens": value})) for value in (-1, 1.5, "2", 10**9, True, [2], 10**400)},
    **{f"text {value!r}": http(reply({"text": value})) for value in (..., *WRONG[:4], *WRONG[6:])},
    **{f"reason {value!r}": http(reply({"finish_reason": value})) for value in (..., None, 1, "", "abort", "error", [], {}, "content_filter")},
    **{f"token ids {value!r}"[:60]: http(reply({"token_ids": value})) for value in (1, "x", {}, [None], ["3"], [-1], [1.5], [10**9], [3] * 10_000, [True])},
    **{f"logprobs {value!r}": http(reply({"logprobs": value})) for value in (1, "x", [1], True, {"top_logprobs": 1}, {"top_logprobs": [1]}, {"top_logprobs": [{"a": "b"}]}, {"top_logprobs": [{"a": None}]})},
    "not JSON": http(None, raw=b"<html>busy</html>"),
    "empty": http(None, raw=b""),
    "half": http(None, raw=json.dumps(reply()).encode()[:40]),
    "not UTF-8": http(None, raw=b'{"choices": [{"text": "\xff\xfe"}]}'),
    "nested": http(None, raw=b"[" * 200_000),
    "digits": http(None, raw=b'{"choices": ' + b"9" * 100_000 + b"}"),
    "60 MB of text": http(reply({"text": "x" * 60_000_000})),
    "60 MB of white space": http(None, raw=b" " * 60_000_000 + json.dumps(reply()).encode()),
    "event stream": http(None, "200 OK", raw=b"data: {}\n\n" * 10),
    "gzip bomb": http(None, "200 OK", "Content-Encoding: gzip", raw=gzip.compress(b" " * 50_000_000)),
    "bad gzip": http(None, "200 OK", "Content-Encoding: gzip", raw=b"nonsense"),
    "204": http(None, "204 No Content", raw=b""),
}  # fmt: skip
STOPS: dict[str, bytes] = {
    "wrong length": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\nConnection: close\r\n\r\n{}",
    "no HTTP": b"hello\r\n\r\n",
    "nothing": b"",
    "bad status": b"HTTP/1.1 999999 ?\r\n\r\n",
    "404 of 60 MB": http(None, "404 Not Found", raw=b"x" * 60_000_000),
    "400 with the key": http({"error": {"message": f"Bearer {KEY} is odd"}}, "400 Bad Request"),
    "401": http({"error": {"message": f"Incorrect API key provided: {KEY}"}}, "401 Unauthorized"),
    "403": http({"error": None}, "403 Forbidden"),
    "418": http({"error": f"key {KEY}"}, "418 I'm a teapot"),
    "redirects without end": http(None, "307 Temporary Redirect", "Location: /v1/completions", raw=b""),
}
FAILURES: dict[str, bytes] = {
    "500 of 60 MB": http(None, "500 Oh", raw=b"x" * 60_000_000),
    "503 without JSON": http(None, "503 Busy", raw=b"<html>"),
    "429 list": http([1], "429 Slow"),
}
MODEL_LISTS: dict[str, bytes] = {
    **{f"list {value!r}": http(value) for value in WRONG},
    **{f"data {value!r}": http({"data": value}) for value in WRONG},
    **{f"id {value!r}": http({"data": [{"id": value}]}) for value in WRONG},
    **{f"length {value!r}": http({"data": [{"id": "tiny", "max_model_len": value}]}) for value in (-1, 0, "x", 1.5, [], True)},
    "list of 60 MB": http({"data": [{"id": "x" * 60_000_000}]}),
    "list that is no JSON": http(None, raw=b"<html>"),
    "list of 1,000 models": http({"data": [{"id": f"m{i}" * 20} for i in range(1000)]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Raw]:
    server = Raw()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def connect(
    server: Raw,
    model: ModelRef,
    make_config: Callable[..., RunConfig],
    renderer: Renderer,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., OpenAIEngine]:
    monkeypatch.setattr("stages.engines.openai._RETRIES", 0)
    monkeypatch.setattr("stages.engines.openai._TIMEOUT_SECONDS", 3.0)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.models = http(MODELS)

    def make(**engine: Any) -> OpenAIEngine:
        config = make_config(
            **{"kind": "openai", "base_url": server.url, "concurrency": 2, "served_model": "tiny", **engine}
        )
        return OpenAIEngine(model._replace(name=config.model.policy) if hasattr(model, "_replace") else ModelRef(config.model.policy, model.path, model.digest), config, renderer)  # fmt: skip

    return make


def completion(engine: OpenAIEngine, request: Request) -> Completion:
    (found,) = engine.stream(iter([request]))
    return found


def test_a_good_reply_is_taken(server: Raw, connect, ask) -> None:
    engine = connect()
    server.reply = http(reply())
    assert completion(engine, ask("r", "hi")).text == "hello"
    assert completion(engine, ask("r", "hi", score=(3,))).score_logprobs == {3: -0.5}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_a_thought_that_the_server_has_cut_off_is_put_before_the_answer(server: Raw, connect, ask, key: str) -> None:
    engine = connect()
    for choice in ({"text": "Four."}, {"text": "<think>\n2+2\n</think>\n\nFour."}):
        server.reply = http(reply({**choice, key: "2+2\n"}))
        assert completion(engine, ask("r", "hi")).text == "<think>\n2+2\n</think>\n\nFour."


@pytest.mark.parametrize("name", [*BODIES, *FAILURES])
def test_a_malformed_reply_is_a_failed_row(server: Raw, connect, ask, name: str) -> None:
    engine = connect()
    server.reply = (BODIES | FAILURES)[name]
    for request in (ask("r", "hi"), ask("s", "hi", score=(3,))):
        found = completion(engine, request)
        if found.finish_reason != "error":  # what concerns text is of no interest to a score, and the other way round
            assert (
                name.startswith(("text", "reason", "token ids", "counted", "usage", "logprobs")) and request.id == "s"
            )
            assert all(math.isfinite(value) for value in found.score_logprobs.values())
        else:
            assert found.error and len(found.error) <= 500 and KEY not in found.error


@pytest.mark.parametrize("value", ["NaN", "Infinity", "0.5", "1e9", '"x"'])
def test_a_score_that_is_no_log_probability_is_a_failed_row(server: Raw, connect, ask, value: str) -> None:
    engine = connect()
    server.reply = http(None, raw=json.dumps(reply()).encode().replace(b"-0.5", value.encode()))
    assert completion(engine, ask("s", "hi", score=(3,))).finish_reason == "error"


@pytest.mark.parametrize("name", STOPS)
def test_a_server_that_cannot_be_used_stops_the_run(server: Raw, connect, ask, name: str) -> None:
    engine = connect()
    server.reply = STOPS[name]
    with pytest.raises(UserError) as caught:
        completion(engine, ask("r", "hi"))
    assert "engine.base_url" in str(caught.value) and len(str(caught.value)) < 4000 and KEY not in str(caught.value)


@pytest.mark.parametrize("name", MODEL_LISTS)
def test_a_malformed_list_of_models_stops_the_run(server: Raw, connect, name: str) -> None:
    server.models = MODEL_LISTS[name]
    with pytest.raises(UserError) as caught:
        connect()
    assert len(str(caught.value)) < 5000


def test_a_reply_that_drips_is_cut(server: Raw, connect, ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_wire, "_BODY_SECONDS", 0.3)
    engine = connect()

    def drip() -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
        for _ in range(200):
            yield b" "
            time.sleep(0.05)

    server.reply = drip()
    assert "took longer" in completion(engine, ask("r", "hi")).error


def test_a_head_that_drips_ends_the_run(server: Raw, connect, ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.engines.openai._PATIENCE_SECONDS", 0.5)
    engine = connect()

    def drip() -> Iterator[bytes]:
        for _ in range(60):
            yield b"H"
            time.sleep(0.05)

    server.reply = drip()
    with pytest.raises(UserError, match="answered none of 1 requests"):
        completion(engine, ask("r", "hi"))


def test_a_key_that_cannot_be_sent_is_said_and_not_shown(connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nü")
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        connect()
    assert KEY not in str(caught.value)
