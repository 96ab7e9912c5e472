"""Tiny random models (hidden 32, 2 layers, vocabulary 100) of the architectures the sketches must work for."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from stages.contract import ModelRef
from stages.gradients.rows import Pair

VOCABULARY = 100
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {**_COMMON, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}


def _configs() -> dict[str, Callable[[], PretrainedConfig]]:
    t = transformers
    gpt2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return {
        "llama": lambda: t.LlamaConfig(**_COMMON),
        "qwen2": lambda: t.Qwen2Config(**_COMMON, tie_word_embeddings=True),
        "qwen3": lambda: t.Qwen3Config(**_COMMON, head_dim=8),
        "gemma2": lambda: t.Gemma2Config(**_GEMMA, final_logit_softcapping=3.0),
        "gemma3": lambda: t.Gemma3TextConfig(**_GEMMA),
        "mistral": lambda: t.MistralConfig(**_COMMON),
        "mistral_sliding": lambda: t.MistralConfig(**_COMMON, sliding_window=6),
        "phi3": lambda: t.Phi3Config(**_COMMON, sliding_window=6),
        "gemma2_eager": lambda: t.Gemma2Config(**_GEMMA, attn_implementation="eager"),
        "bloom": lambda: t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "mamba": lambda: t.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
        "lfm2": lambda: t.Lfm2Config(**_COMMON, layer_types=["conv", "full_attention"]),
        "phi": lambda: t.PhiConfig(**_COMMON),
        "gpt2": lambda: t.GPT2Config(**gpt2, bos_token_id=1, eos_token_id=2),
        "cohere": lambda: t.CohereConfig(**_COMMON, logit_scale=0.3),
        "granite": lambda: t.GraniteConfig(**_COMMON, logits_scaling=4.0),
    }


ARCHITECTURES = tuple(_configs())


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """make_model(architecture, seed=0, dtype=float32): weights large enough that nothing is near zero."""

    def make(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(_configs()[architecture]())
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
        return model.to(dtype)

    return make


@pytest.fixture
def make_pairs() -> Callable[..., list[Pair]]:
    """make_pairs(n, seed): random pairs of unequal lengths."""

    def make(n: int, seed: int = 0, longest: int = 12) -> list[Pair]:
        rng = random.Random(seed)

        def ids(low: int) -> tuple[int, ...]:
            return tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, longest)))

        pairs: list[Pair] = []
        while len(pairs) < n:
            pair = Pair(ids(2), ids(1), ids(1))
            if pair.chosen != pair.rejected:
                pairs.append(pair)
        return pairs

    return make


def full_logits_values(model: PreTrainedModel, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """The oracle: the model's own full logits, log_softmax over everything, one unpadded sequence."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    first = len(prompt)
    return torch.stack([log_probs[first - 1 + k, token] for k, token in enumerate(completion)])


@pytest.fixture
def oracle_values() -> Callable[..., torch.Tensor]:
    """full_logits_values as a fixture (test folders are not packages)."""
    return full_logits_values


@pytest.fixture
def models(tiny_model):
    same = ModelRef("tiny", tiny_model, "d")
    return {"policy": same, "reference": same}
