"""Tiny random models of every architecture that transformers has: its own configuration, made small by the names of its fields."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from stages.models.text_model import auto_class

VOCABULARY = 100
_WIDTH = dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "emb_dim"), 32)
_INNER = dict.fromkeys(
    ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 48
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_EIGHT = (
    *("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "state_size", "mamba_d_state"),
    *("ssm_state_size", "linear_key_head_dim", "linear_value_head_dim", "query_pre_attn_scalar"),
    *("sliding_window", "hidden_size_per_layer_input", "global_head_dim", "rotary_dim"),
)
_SIXTEEN = (
    *("moe_intermediate_size", "expert_intermediate_size", "shared_expert_intermediate_size"),
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "mamba_d_head", "audio_hidden_size"),
)
SMALL: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY},
    **_WIDTH,
    **_INNER,
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_EIGHT, 8),
    **dict.fromkeys(_SIXTEEN, 16),
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 1},
    **{"mamba_n_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
}
_ODD: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16, "mamba_n_heads": 4},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8, "per_layer_config": {}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "mamba_dt_rank": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 4, "mamba_headdim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "mistral": {"sliding_window": None},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
}
"""What the names of fields do not say."""
_THREE_POSITIONS = (
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text", "glm4v_text", "glm4v_moe_text"),
    *("glm_ocr_text",),
)
"""Text models of wrappers with a rotary position for time, height and width each."""


def tiny_config(name: str, **fields: Any) -> PretrainedConfig:
    """The configuration of a model type, small. Sub-configurations (text, vision) are made small as well."""
    return _small(CONFIG_MAPPING[name], **fields)


def _small(kind: type[PretrainedConfig], **fields: Any) -> PretrainedConfig:
    """Fields the class has, of plain kinds, are replaced; then those that need more than a name."""
    whole = kind()
    known = {
        field: value
        for field, value in SMALL.items()
        if _plain(whole, field) and field not in getattr(kind, "attribute_map", {})
    }
    for field, sub in kind.sub_configs.items():
        given = getattr(whole, field, None)
        if isinstance(given, PretrainedConfig):
            known[field] = _small(type(given))
        elif isinstance(sub, type) and issubclass(sub, PretrainedConfig):
            known[field] = _small(sub)
    if hasattr(whole, "kv_lora_rank"):  # latent attention: every head has its own keys
        known["num_key_value_heads"] = 4
    if kind.model_type in _THREE_POSITIONS:
        known["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    known |= _ODD.get(kind.model_type, {}) | fields
    if getattr(whole, "is_decoder", None) is False:
        known["is_decoder"] = True
    return kind(**known)


def _plain(config: PretrainedConfig, field: str) -> bool:
    if isinstance(getattr(type(config), field, None), property):
        return False
    try:
        return isinstance(getattr(config, field), int | float | None)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def tiny_model(config: PretrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Random weights, large enough that no gradient is near zero and routers choose."""
    torch.manual_seed(seed)
    model: PreTrainedModel = auto_class(config).from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(dtype).eval()


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config)
    return model


def model_types() -> list[str]:
    """Every type that transformers makes a language model of."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    names = dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES])
    return [name for name in names if name in transformers.CONFIG_MAPPING]
