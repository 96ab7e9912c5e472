"""Config of the models, of the text they see, and of the engines that run them."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator

from schemas.config.base import FilePath, Section, execution, other_than, semantic
from schemas.engines import ENGINES, EngineFacts, EngineName


class ModelConfig(Section):
    """Which models take part: hub ids, folders, or `embedded:<name>`.

    Names are execution fields because what counts is the hash of the model's content, which every stage that uses
    a model has in its fingerprint: a moved folder is the same model, a changed one is not.
    """

    policy: FilePath = execution(
        description="the model to align: hub id, folder (PEFT adapters are merged), embedded:NAME"
    )
    judge: FilePath | None = execution(
        None, "another model as judge; default: the round's policy judges itself", used_when={"pairs.sources": []}
    )
    evaluation_judge: FilePath | None = execution(
        None,
        "judge of the evaluation; default: the round-0 policy",
        used_when={"evaluate.win_rate": True, "evaluate.prompts_per_language": other_than(0)},
    )
    reference: FilePath | None = execution(
        None,
        "DPO's reference, and that of the implicit rewards, where it is not the policy itself: what the policy was trained from; later rounds: train.reference",
        used_when={"loss.type": other_than("simpo")},
    )
    revision: str | None = execution(None, "hub revision of the policy")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = semantic(
        "auto", "auto: bfloat16; in float16 no pair can be scored"
    )
    trust_remote_code: bool = semantic(False, "run code shipped with the model; off unless you ask")


class TextConfig(Section):
    """Text to tokens, one contract for generation, gradients and training (docs/methods.md section 0)."""

    system_role: Literal["fold", "refuse"] = semantic(
        "fold", "template without a system role: fold it into the user turn"
    )
    chat_template: FilePath | None = semantic(None, "a Jinja template file instead of the tokenizer's own")
    chat_template_kwargs: dict[str, Any] = semantic({"enable_thinking": False}, "passed to the chat template")
    thoughts: Literal["strip", "keep", "drop"] = semantic(
        "strip",
        "a thought before an answer (<think>, or what the template has for it), imported or generated: strip: what is said "
        "after it is learnt; keep: the thought too; drop: the answer goes",
    )
    max_length: int = semantic(
        2048, "prompt + completion tokens; longer ones are dropped with a reason", ge=16, le=1 << 24
    )


class EngineConfig(Section):
    """What runs generation and judging."""

    kind: EngineName = semantic("vllm", "inference engine")
    base_url: str | None = semantic(
        None,
        "openai: server, for example http://localhost:8000/v1; $VARIABLES are taken from the environment",
        used_when={".kind": "openai"},
    )
    served_model: str | None = semantic(
        None, "openai: model name on the server; default: model.policy", used_when={".kind": "openai"}
    )
    api_key_env: str = execution(
        "OPENAI_API_KEY", "openai: environment variable that holds the key", used_when={".kind": "openai"}
    )
    concurrency: int = execution(32, "openai: requests in flight", ge=1, le=4096, used_when={".kind": "openai"})
    requests_per_minute: int | None = execution(
        None,
        "openai: most requests in a minute, of all workers together, retries too; unset: as many as concurrency lets them",
        used_when={".kind": "openai"},
        ge=1,
        le=1 << 24,
    )
    input_price: float = execution(
        0.0,
        "openai: price of a million tokens read; what a stage costs is then said",
        used_when={".kind": "openai"},
        ge=0,
    )
    output_price: float = execution(
        0.0, "openai: price of a million tokens written", used_when={".kind": "openai"}, ge=0
    )
    batch_size: int = semantic(
        8, "transformers: rows per batch (fixed inside a shard)", ge=1, used_when={".kind": "transformers"}
    )
    enforce_eager: bool = execution(
        False, "vllm: no CUDA graphs or compilation: starts faster, runs slower", used_when={".kind": "vllm"}
    )
    gpu_memory_utilization: float = execution(
        0.9, "vllm on CUDA: share of GPU memory", gt=0, le=1, used_when={".kind": "vllm"}
    )
    cpu_kv_cache_gib: int = execution(
        2, "vllm on CPU: size of the KV cache", ge=1, le=1 << 16, used_when={".kind": "vllm"}
    )
    max_num_seqs: int = execution(
        256, "vllm: sequences decoded together", ge=1, le=1 << 16, used_when={".kind": "vllm"}
    )
    tensor_parallel: int = execution(1, "vllm: GPUs per worker", ge=1, le=1024, used_when={".kind": "vllm"})

    @field_validator("base_url")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not (parts.hostname or "$" in value):
                raise ValueError("it must be an http or https address, for example http://localhost:8000/v1")
            if "$" not in value and parts.port == 0:  # urlsplit raises ValueError for a port that is none
                raise ValueError("there is no port 0")
        return value

    @model_validator(mode="after")
    def _server(self) -> EngineConfig:
        for key in self.facts.requires:
            if not getattr(self, key):
                raise ValueError(f"engine.kind: {self.kind} needs engine.{key}")
        return self

    @property
    def facts(self) -> EngineFacts:
        """What is true of the engine."""
        return ENGINES[self.kind]


_SAMPLED = {".temperature": other_than(0.0)}


class Sampling(Section):
    """Sampling parameters of one stage."""

    temperature: float = semantic(0.8, "0 is greedy", ge=0)
    top_p: float = semantic(
        1.0, "nucleus; below 1 sorts the vocabulary at every token (slow on CPU)", used_when=_SAMPLED, gt=0, le=1
    )
    min_p: float = semantic(0.0, "relative floor; cheap", used_when=_SAMPLED, ge=0, le=1)
    top_k: int = semantic(0, "0: off", used_when=_SAMPLED, ge=0)
    max_tokens: int = semantic(512, "longest answer", ge=1, le=1 << 24)
    stop: list[str] = semantic([], "stop strings (removed from the answer)")
    system_prompt: str | None = semantic(None, "system message put before the conversation")
