"""What an inference engine is: requests in, completions out, in any order, as they finish."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from schemas import errors
from schemas.config import RunConfig
from schemas.config.model import EngineConfig, Sampling
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

    An engine of another task (`schemas.engines.Task`) takes a whole conversation to be rewarded, or a prompt and target_ids, the
    answer whose log-likelihood is wanted; neither samples. whole: prompt_ids are such a conversation. engine: which of several, see `Fleet`.
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
    target_ids: tuple[int, ...] = ()
    engine: int = 0
    whole: bool = False

    @property
    def room(self) -> int:
        """Tokens of the context beyond the prompt."""
        return 0 if self.whole else len(self.target_ids) or (1 if self.score_tokens else self.sampling.max_tokens)

    @property
    def read_tokens(self) -> int:
        """Tokens that are read and not generated, where that is the work."""
        return len(self.prompt_ids) + len(self.target_ids) if self.score_tokens or self.target_ids else 0


@dataclass(frozen=True)
class Completion:
    """The answer to a request.

    text: without control tokens and stop strings. token_ids: None if the server does not say.
    n_tokens: generated, end of turn included. finish_reason: stop | length, or error (then `error` says why).
    score_logprobs: token id -> natural log of its next-token probability at temperature 1; ids a server
    did not report are absent. values: reward: a value per head; loglik: the sum over the target's tokens in nats.
    """

    id: str
    text: str
    token_ids: list[int] | None
    n_tokens: int
    finish_reason: str
    score_logprobs: dict[int, float] = field(default_factory=dict)
    error: str = ""
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Tariff:
    """server: whom the requests go to, for people. Prices are of a million tokens; 0: nobody said."""

    server: str
    input_price: float = 0.0
    output_price: float = 0.0

    @classmethod
    def of(cls, engine: EngineConfig, model: str) -> Tariff | None:
        """Of an engine that asks a server for a model; None for others."""
        if engine.facts.has_weights:
            return None
        return cls(f"{engine.served_model or model} at {engine.base_url}", engine.input_price, engine.output_price)

    @property
    def priced(self) -> bool:
        """Whether there are prices."""
        return self.input_price > 0 or self.output_price > 0


class Engine(ABC):
    """A loaded model. context_length: most tokens of prompt and answer together. labels: of a classifier's heads. tariff: of one that
    asks a server."""

    renderer: Renderer
    context_length: int
    labels: tuple[str, ...] = ()
    tariff: Tariff | None = None

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


class Fleet(Engine):
    """Several engines as one: each request goes to the engine that its `engine` names. What is asked of a group (shard) is asked
    of one engine after the other, so that batches do not depend on other groups. renderer: the first engine's."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self.renderer = engines[0].renderer
        self.context_length = min(engine.context_length for engine in engines)

    def stream(self, requests: Iterator[Request]) -> Iterator[Completion]:
        """See `Engine.stream`."""
        for _, group in groupby(requests, key=lambda request: request.group):
            asked = list(group)
            for number, engine in enumerate(self.engines):
                yield from engine.stream(request for request in asked if request.engine == number)

    def close(self) -> None:
        """Close all."""
        for engine in self.engines:
            engine.close()


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
    room = request.room
    if len(request.prompt_ids) + room <= context_length:
        return None
    error = f"{len(request.prompt_ids)} prompt tokens and {room} more exceed the context of {context_length}"
    return Completion(request.id, "", [], 0, "error", error=error)
