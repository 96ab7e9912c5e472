"""What a server may answer: replies of bounded size and time, checked before anything is taken from them."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, TypeVar

import openai
from pydantic import BaseModel, ConfigDict, Field, ValidationError

# The httpx that openai is built on: httpx2 since 3.0.
_httpx: Any = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
_MOST_BYTES = 8 << 20
_MOST_ERROR_BYTES = 64 << 10
_BODY_SECONDS = 120.0
"""From the head of a reply to its last byte: servers send a finished reply at once."""
_CUT = "congrad_cut"
_ROUNDING = 1e-3

_Checked = TypeVar("_Checked", bound=BaseModel)


class Malformed(Exception):
    """A reply that is not what was asked for; says why."""


class _Part(BaseModel):
    """Fields beyond these are the server's own business."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Served(_Part):
    """An entry of /models."""

    id: str
    owned_by: str | None = None
    max_model_len: Annotated[int, Field(ge=1)] | None = None


class ServedModels(_Part):
    """The reply of /models."""

    data: list[Served]


class Logprobs(_Part):
    """`top_logprobs`: token text (or `token_id:N`) -> log-probability, for every position."""

    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(_Part):
    """One continuation."""

    text: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None
    token_ids: list[Annotated[int, Field(ge=0)]] | None = None

    @property
    def answer(self) -> str | None:
        """The text, after the thought that a server's reasoning parser has cut off it, in its marks."""
        thought = (self.reasoning_content or self.reasoning or "").strip()
        if not thought or "</think>" in (self.text or ""):
            return self.text
        return f"<think>\n{thought}\n</think>\n\n{self.text or ''}"


class Usage(_Part):
    """What the server counted."""

    completion_tokens: Annotated[int, Field(ge=0)] | None = None


class Reply(_Part):
    """The reply of /completions."""

    choices: Annotated[list[Choice], Field(min_length=1)]
    usage: Usage | None = None

    @property
    def choice(self) -> Choice:
        """The one that was asked for."""
        return self.choices[0]

    def first_logprobs(self) -> dict[str, float]:
        """Log-probabilities of the first position. Raises Malformed where there are none, or one is none."""
        positions = self.choice.logprobs.top_logprobs if self.choice.logprobs else None
        if not positions or positions[0] is None:
            raise Malformed("it has no log-probabilities")
        for value in positions[0].values():
            if not (math.isfinite(value) or value == -math.inf) or value > _ROUNDING:
                raise Malformed(f"{value} is no log-probability")
        return positions[0]


class Classified(_Part):
    """The logits of one conversation, or what an activation made of them: vLLM calls both probabilities."""

    probs: list[float]


class Classes(_Part):
    """The reply of /classify."""

    data: Annotated[list[Classified], Field(min_length=1)]


class Raw(NamedTuple):
    """A response as `read` takes it."""

    http_response: Any
    content: bytes


def post(client: openai.OpenAI, url: str, body: dict[str, Any]) -> Raw:
    """Post to an address that the client has no method for. Raises openai.OpenAIError."""
    response = client.post(url, body=body, cast_to=_httpx.Response)
    return Raw(response, response.content)


def client(base_url: str, key: str, retries: int, seconds: float, sending: Callable[[Any], None]) -> openai.OpenAI:
    """A client whose replies are cut at a size and a time: `read` says so. seconds: of silence. sending: called before anything is sent, retries
    too. Raises ValueError for no URL."""
    try:
        return openai.OpenAI(
            base_url=base_url,
            api_key=key,
            max_retries=retries,
            timeout=seconds,
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultHttpxClient(
                event_hooks={"request": [sending], "response": [_bound]}, timeout=seconds
            ),
        )
    except _httpx.InvalidURL as error:
        raise ValueError(str(error)) from error


def read(response: Any, kind: type[_Checked]) -> _Checked:
    """The checked body of a raw response. Raises Malformed."""
    if cut := response.http_response.extensions.get(_CUT):
        raise Malformed(cut)
    try:
        return kind.model_validate(json.loads(response.content))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise Malformed(f"{'.'.join(map(str, first['loc'])) or 'reply'}: {first['msg']}") from None
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of thousands of digits, nesting without end
        raise Malformed("it is no JSON") from None


def _bound(response: Any) -> None:
    """Cut the body of a response where it is larger or slower than any honest one."""
    if response.headers.get("content-encoding", "identity") != "identity":
        del response.headers["content-encoding"]  # a few bytes may unpack into gigabytes: not asked for, not unpacked
        response.extensions[_CUT] = "it is compressed, which was not asked for"
    most = _MOST_ERROR_BYTES if response.status_code >= 400 else _MOST_BYTES
    response.stream = _Bounded(response.stream, response.extensions, most)


class _Bounded(_httpx.SyncByteStream):
    def __init__(self, stream: Any, extensions: dict[str, Any], most: int) -> None:
        self._stream, self._extensions, self._most = stream, extensions, most

    def __iter__(self) -> Iterator[bytes]:
        size, deadline = 0, time.monotonic() + _BODY_SECONDS
        if _CUT in self._extensions:
            return
        for chunk in self._stream:
            size += len(chunk)
            if size > self._most:
                self._extensions[_CUT] = f"it is larger than {self._most:,} bytes"
                return
            yield chunk
            if time.monotonic() > deadline:
                self._extensions[_CUT] = f"it took longer than {_BODY_SECONDS:.0f} s to arrive"
                return

    def close(self) -> None:
        self._stream.close()
