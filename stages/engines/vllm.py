"""The vLLM engine. CPU or CUDA, whichever the installed vllm is for.

Its core runs in the process that makes it: stages run it in a process of its own (stages.engines.process), which can be
killed, restarted, and gives all its memory back.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.contract import Context, ModelRef
from stages.engines.base import (
    Completion,
    Request,
    StreamingEngine,
    context_length,
    not_finite,
    refused_by_length,
    storable_line,
)
from stages.models.gpus import given_gpus
from stages.models.strict import skeleton
from stages.text.render import Renderer, load_renderer

_NANS = "NaNs detected in logits"
"""What vLLM says with VLLM_RAISE_ON_LOGIT_NANS."""


class VllmEngine(StreamingEngine):
    """vLLM's engine core driven request by request; see `stages.engines.base.Engine`.

    About 2 * engine.max_num_seqs requests are in flight, over shard borders, so the engine never drains in between.
    A request's answer depends on its seed, and in its last bits on the batches vLLM makes: equal in distribution, not
    bit for bit. arguments: more of vLLM's own.
    """

    arguments: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, model: ModelRef, config: RunConfig, renderer: Renderer) -> None:
        if find_spec("vllm") is None:
            raise UserError(config.engine.facts.missing, where="engine.kind", fix=config.engine.facts.fix)
        self.renderer = renderer
        self._set_environment(config)
        import vllm
        from transformers import AutoConfig
        from vllm.platforms import current_platform

        self._vllm: Any = vllm
        on_cpu = current_platform.is_cpu()
        given = config.execution.device == "auto" and on_cpu and given_gpus()
        if given or config.execution.device == ("cuda" if on_cpu else "cpu"):
            wanted = (
                f"this worker has GPU {', '.join(given)}" if given else f"execution.device is {config.execution.device}"
            )
            raise UserError(
                f"{wanted}, but the installed vllm is built for "
                f"{'the CPU' if on_cpu else current_platform.device_name}",
                where="execution.device",
                fix=f"Set execution.device: {'cpu' if on_cpu else 'auto'}, or install the other build of vllm.",
            )
        engine = config.engine
        self.check(model, config)
        try:
            hf_config = AutoConfig.from_pretrained(str(model.path), trust_remote_code=config.model.trust_remote_code)
            self._llm: Any = vllm.LLM(
                model=str(model.path),
                load_format="safetensors",
                dtype="bfloat16" if config.model.dtype == "auto" else config.model.dtype,
                max_model_len=context_length(hf_config, config),
                max_num_seqs=engine.max_num_seqs,
                tensor_parallel_size=engine.tensor_parallel,
                gpu_memory_utilization=engine.gpu_memory_utilization,
                enforce_eager=engine.enforce_eager,
                # a prompt cut in two draws a token and takes it back, which a seeded generator of the CPU cannot (vLLM 0.32)
                enable_chunked_prefill=False if on_cpu else None,
                enable_prefix_caching=config.generate.prefix_caching,
                trust_remote_code=config.model.trust_remote_code,
                language_model_only=True,  # of a multimodal wrapper: no towers, and no processor of images is looked for
                seed=0,
                disable_log_stats=True,
                **self.arguments,
            )
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            raise UserError(
                f"vLLM cannot load {model.name}: {storable_line(error)}",
                where=str(model.path),
                fix="Check that vLLM knows this architecture and that memory suffices (text.max_length, "
                "engine.max_num_seqs, engine.gpu_memory_utilization, engine.cpu_kv_cache_gib), or set "
                "engine.kind: transformers.",
            ) from error
        self.context_length: int = self._llm.model_config.max_model_len
        self._name, self._dtype = model.name, config.model.dtype
        self._in_flight = 2 * engine.max_num_seqs
        self.labels = self.labels_of(hf_config)

    def check(self, model: ModelRef, config: RunConfig) -> None:
        """Raise UserError for files that do not fit: vLLM fills some of what is missing with zeros, and ignores the rest."""
        skeleton(model, config.model.trust_remote_code)

    def labels_of(self, hf_config: Any) -> tuple[str, ...]:
        """See `Engine.labels`."""
        return ()

    def stream(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        """See `StreamingEngine.stream`."""
        core = self._llm.llm_engine
        open_requests: dict[str, Request] = {}
        exhausted = False
        try:
            while not exhausted or open_requests:
                while not exhausted and len(open_requests) < self._in_flight:
                    try:
                        request = next(requests)
                    except StopIteration:
                        exhausted = True
                        break
                    if request is None:
                        break
                    if (problem := self._add(request)) is not None:
                        yield problem
                    else:
                        open_requests[request.id] = request
                for output in self._step(core) if open_requests else ():
                    if output.finished:
                        yield self._completion(open_requests.pop(output.request_id), output)
        finally:
            if open_requests:
                core.abort_request(list(open_requests))

    def close(self) -> None:
        """Shut the engine down. GPU memory may stay taken until the process ends."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()

    def _step(self, core: Any) -> Any:
        """What one step of vLLM finished. Raises UserError when a model's logits are not numbers: vLLM would draw from them."""
        try:
            return core.step()
        except RuntimeError as error:
            if _NANS not in str(error):
                raise
            raise not_finite(self._name, self._dtype) from error

    def _add(self, request: Request) -> Completion | None:
        """Hand a request to vLLM; the error completion of one that it refuses."""
        problem = refused_by_length(request, self.context_length)
        if problem is not None:
            return problem
        prompt = {"type": "token", "prompt_token_ids": [*request.prompt_ids, *request.target_ids]}
        try:
            self._llm.llm_engine.add_request(request.id, prompt, self._parameters(request))
        except ValueError as error:
            return Completion(request.id, "", [], 0, "error", error=f"vLLM refuses the request: {storable_line(error)}")
        return None

    def _completion(self, request: Request, output: Any) -> Completion:
        """What a finished output says."""
        if request.target_ids:
            found = output.prompt_logprobs[len(request.prompt_ids) :]
            sum_ = sum(at[token].logprob for at, token in zip(found, request.target_ids, strict=True))
            if not math.isfinite(sum_):
                return Completion(request.id, "", [], 0, "error", error=not_finite(self._name, self._dtype).what)
            return Completion(request.id, "", [], 0, "length", values=(sum_,))
        said = output.outputs[0]
        if request.score_tokens:
            top = said.logprobs[0]
            scores = {token: top[token].logprob for token in request.score_tokens if token in top}
            return Completion(request.id, "", [], 0, "length", scores)
        token_ids = list(said.token_ids)
        reason = said.finish_reason
        error = "" if reason in ("stop", "length") else f"vLLM ended the request: {reason}"
        return Completion(request.id, said.text, token_ids, len(token_ids), reason, error=error)

    def _parameters(self, request: Request) -> Any:
        kind = self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        if request.target_ids:
            return self._vllm.SamplingParams(
                max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, output_kind=kind
            )
        if request.score_tokens:
            return self._vllm.SamplingParams(
                max_tokens=1,
                temperature=0.0,
                logprob_token_ids=list(request.score_tokens),
                detokenize=False,
                output_kind=kind,
            )
        sampling = request.sampling
        return self._vllm.SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=request.seed,
            stop=sampling.stop,
            stop_token_ids=list(self.renderer.stop_ids),
            output_kind=kind,
        )

    @staticmethod
    def _set_environment(config: RunConfig) -> None:
        """vLLM reads these when it is imported. All cores of this worker: by default it leaves one idle."""
        cores = sorted(os.sched_getaffinity(0))
        threads = config.execution.threads or int(os.environ.get("OMP_NUM_THREADS", len(cores)))
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.engine.cpu_kv_cache_gib)
        if threads >= len(cores):
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        else:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # other workers share the cores
            os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ.setdefault("VLLM_RAISE_ON_LOGIT_NANS", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def load(model: ModelRef, config: RunConfig, ctx: Context | None) -> VllmEngine:
    """See `stages.engines.base.Load`; called in the engine's process."""
    return VllmEngine(model, config, load_renderer(model, config.text, config.model.trust_remote_code))
