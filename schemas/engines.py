"""The inference engines: every fact about one, readable before its package is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

EngineName = Literal["vllm", "transformers", "openai"]
Task = Literal["text", "reward", "loglik"]
"""What is asked of a model: to go on with a text (or its next token's probabilities), the rewards of a conversation by a
sequence classifier, or the log-likelihood of a given answer."""


@dataclass(frozen=True)
class EngineFacts:
    """All that is true of an engine; nothing elsewhere asks for its name.

    loads: task -> MODULE:FUNCTION in stages.engines, a `stages.engines.base.Load`; a task that is not there it cannot do.
    packages: what it imports. missing, fix: what to say when one of them is not there (empty: the usual words).
    requires: keys of `engine` that must be given.
    has_weights: loads any model of the run itself; False: a server holds one model, and not one that the run trains.
    deterministic: the same bits again on a CPU in float32 (execution.deterministic).
    parallel: spreads a model over engine.tensor_parallel GPUs.
    reserves: takes engine.gpu_memory_utilization of a GPU, or engine.cpu_kv_cache_gib, when it starts.
    own_process: runs in a process of its own, which is restarted when it dies.
    """

    loads: Mapping[Task, str]
    packages: tuple[str, ...]
    missing: str = ""
    fix: str = 'Install them: pip install -e ".[cpu]" or ".[cuda]".'
    requires: tuple[str, ...] = ()
    has_weights: bool = True
    deterministic: bool = False
    parallel: bool = False
    reserves: bool = False
    own_process: bool = False


MOST_OF_A_GPU = 0.95
"""What engines that are loaded together may reserve of one: each finds its share free when it starts, beside what CUDA itself takes."""

ENGINES: Mapping[EngineName, EngineFacts] = {
    "vllm": EngineFacts(
        loads={"text": "vllm:load", "reward": "vllm_reward:load", "loglik": "vllm:load"},
        packages=("vllm",),
        missing="vLLM is not installed",
        fix='Install it (pip install -e ".[cuda]", or make with PLATFORM=cpu), or set engine.kind: transformers.',
        parallel=True,
        reserves=True,
        own_process=True,
    ),
    "transformers": EngineFacts(
        loads={
            "text": "transformers:load",
            "reward": "transformers_scores:load_reward",
            "loglik": "transformers_scores:load_loglik",
        },
        packages=("torch", "transformers"),
        deterministic=True,
    ),
    "openai": EngineFacts(
        loads={"text": "openai:load", "reward": "openai_reward:load"},
        packages=("openai", "transformers"),
        requires=("base_url",),
        has_weights=False,
    ),
}
