"""What an inference engine is: requests in, completions out, in any order, as they finish."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from schemas import errors
from schemas.config import RunConfig
from schemas.config.model import Sampling
from schemas.errors import UserError
from stages.contract import Context, ModelRef
from stages.text.messages import storable

if TYPE_CHECKING:
    from stages.text.render import Renderer

JUDGE_ROOM = 2048
"""Tokens an engine's context has beyond text.max_length: a judge sees a rubric around prompt and answer."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue, or, with score_tokens, one position whose next-token log-probabilities are wanted.

    id: unique among the requests in flight. seed: 63 bits, the only source of randomness of this request.
    score_tokens: token ids; nothing is generated then. group: requests of different groups (shards) never share
    a batch in engines with fixed batches, so that a shard's result does not depend on its neighbours.
    """

    id: str
    prompt_ids: list[int]
    sampling: Sampling
    seed: int
    score_tokens: tuple[int, ...] = ()
    group: int = 0


@dataclass(frozen=True)
class Completion:
    """The answer to a request.

    text: without control tokens and stop strings. token_ids: None if the server does not say.
    n_tokens: generated, end of turn included. finish_reason: stop | length, or error (then `error` says why).
    score_logprobs: token id -> natural log of its next-token probability at temperature 1; ids a server
    did not report are absent.
    """

    id: str
    text: str
    token_ids: list[int] | None
    n_tokens: int
    finish_reason: str
    score_logprobs: dict[int, float] = field(default_factory=dict)
    error: str = ""


class Engine(ABC):
    """A loaded model. context_length: most tokens of prompt and answer together."""

    renderer: Renderer
    context_length: int

    @abstractmethod
    def stream(self, requests: Iterator[Request]) -> Iterator[Completion]:
        """Yield each request's completion as it finishes; requests are pulled lazily, as the engine has room.

        A request longer than the context gives a completion with finish_reason error; it is never cut.
        """

    @abstractmethod
    def close(self) -> None:
        """Give memory back; the engine is not used afterwards."""


class StreamingEngine(Engine):
    """An engine that goes on with what it has when no request is at hand: what one in a process of its own must do."""

    @abstractmethod
    def stream(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        """See `Engine.stream`. A None among the requests: there is none just now."""


Load = Callable[[ModelRef, RunConfig, Context | None], Engine]
"""`load` of an engine's module: the engine of a model. ctx: where it may note and lower its limits, if anywhere. Raises
UserError when the model cannot be loaded."""


def context_length(hf_config: Any, config: RunConfig) -> int:
    """Tokens an engine is set up for: what the run needs, at most what the model was made for."""
    wanted = config.text.max_length + JUDGE_ROOM
    limit = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    return min(wanted, limit) if limit else wanted


def storable_line(error: Exception) -> str:
    """`schemas.errors.first_line` as text that a table can hold."""
    return storable(errors.first_line(error))


def not_finite(name: str, dtype: str) -> UserError:
    """A model whose next-token distribution is no distribution: what is drawn from it is garbage."""
    return UserError(
        f"The next-token logits of {name} are not finite (NaN or overflow) in {'bfloat16' if dtype == 'auto' else dtype}",
        where="model.dtype",
        fix="Set model.dtype: float32, or check the model: its weights may be damaged or made for another precision.",
    )


def refused_by_length(request: Request, context_length: int) -> Completion | None:
    """The error completion of a request that does not fit the context; None if it fits."""
    room = 1 if request.score_tokens else request.sampling.max_tokens
    if len(request.prompt_ids) + room <= context_length:
        return None
    error = f"{len(request.prompt_ids)} prompt tokens and {room} to generate exceed the context of {context_length}"
    return Completion(request.id, "", [], 0, "error", error=error)
